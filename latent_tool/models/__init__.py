"""The model side: the only place that imports transformers.

``load`` gives a ``VisionLanguageModel``; everything else here serves it.
"""

import warnings

# In a notebook without ipywidgets, importing tqdm warns; transformers does so, and its progress bars fall back to text.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto  # noqa: F401
