"""Labelled questions about images, from files, from easy-VQA and from the embedded model's own scenes.

``load_dataset`` reads everything but the pixels, which ``Item.load`` opens when a question is asked. A row that cannot
be used is named by its line: it raises ``DatasetError``, or becomes an item that carries its ``problem``; none is
dropped. Nothing here knows models or methods.
"""

from latent_tool.evaluation.datasets.items import Box, Item, dataset_fingerprint, sample
from latent_tool.evaluation.datasets.load import is_built_in, load_dataset

__all__ = ["Box", "Item", "dataset_fingerprint", "is_built_in", "load_dataset", "sample"]
