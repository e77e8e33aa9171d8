"""Policies that act, and improvement of trained models by a reward.

- :mod:`genkit.rl.policies`: trained runs as policies and planners, their episodes, and choosing by a Q-function.
- :mod:`genkit.rl.finetune`: the denoising chain, tasks, reward methods and the fine-tuning loop.
"""
