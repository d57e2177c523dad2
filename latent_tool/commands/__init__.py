"""Commands of ``latent-tool`` that have a module of their own."""
