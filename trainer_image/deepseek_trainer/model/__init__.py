"""The DeepSeek model: latent attention, mixture of experts, and their initial weights. It knows
nothing of processes but a group.
"""
