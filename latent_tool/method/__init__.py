"""The method as tensor code: reward, latent policy, patch proposals, visual dependency and the search.

It is that of "Reasoning Within the Mind: Dynamic Multimodal Interleaving in Latent Space", arXiv 2512.12623.

    symbol                     name                                  file
    T, (L, d)                  latents                               search.py
    V, V_best                  patches, the injected image cells     search.py, State
    R = 1 - mean H_k           top_k_entropy, read_reward            reward.py
    k, |V|                     top_k, vocabulary                     reward.py
    T' = T + eps, eps ~ N      draw_noise, sigma                     policy.py
    grad J = E[R eps / sigma2] advantages, policy_gradient           policy.py
    T <- T + eta grad J        ascend, eta                           search.py
    A, (L, C), top m           attention, propose, patches_per_latent  patches.py
    V <- V + P if R rises      walk, min_gain                        search.py
    S = log p - log p_noised   visual_dependency, add_noise          grounding.py

``SearchSettings.paper()`` is the paper's own choice of settings; the defaults deviate where the settings say so.
Nothing here knows a model, a tokenizer or an image: a model is whatever the search awaits (``search.LatentModel``), and
``asking`` says how it awaits it.
"""
