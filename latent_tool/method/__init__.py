"""The method as tensor code: reward, latent policy, patch proposals, visual dependency and the search.

Nothing here knows a model, a tokenizer or an image; a model is whatever answers the questions ``search`` asks.
"""
