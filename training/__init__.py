"""The recipe of the embedded model: from random weights to the shipped checkpoint and its model card.

Run it with ``python -m training`` (see ``--help``). It needs the ``[train]`` extra; using the package never does.

    settings    every number of the recipe
    world       what training is shown: scenes, easy-VQA, photographs
    strangers   pictures of nothing this world knows
    looking     what the third stage is shown: canvases, windows, what cannot be told
    labels      a scene -> one label per image cell
    checkpoint  an untrained model, its tokenizer and processor; saving and loading
    packing     questions -> packed rows of tokens
    forward     the model as plain functions over packed rows
    optimizer   Muon for matrices, AdamW for the rest
    stages      vision warm-up, language and looking on several processes, with resume
    independent a second renderer with its own wording, which training never sees
    items       the questions and pictures of the model card
    evaluate    the measurements of the model card
    card        measurements -> model card
"""
