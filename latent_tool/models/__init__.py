"""The model side: the only place that imports transformers.

``load`` gives a ``VisionLanguageModel``; everything else here serves it.
"""
