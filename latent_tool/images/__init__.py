"""Pictures: any reference becomes an upright RGB image, or a typed error.

``load`` is the door; ``references``, ``files`` and ``download`` fetch bytes, ``kinds`` names what they are,
``containers``, ``orientation`` and ``pixels`` decode them within ``limits``, and ``apart`` does so in another process.
"""

from latent_tool.images.load import LoadedImage, is_whole, load_image, load_images, portable_image

__all__ = ["LoadedImage", "is_whole", "load_image", "load_images", "portable_image"]
