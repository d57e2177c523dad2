"""latent_tool: confidence-guided latent reasoning with images, as a tool that agents can gate on."""
