"""Fine-tuning by reward: a sampler is a Markov chain of Gaussian steps, so that policy gradients apply.

- ``noise``, ``chain``: exploration noise, and the chain of denoising steps with its log-probabilities.
- ``tasks``, ``env_rewards``, ``image_rewards``: sources of rewards.
- ``experience``, ``advantages``: trajectories with their rewards, and the credit for them.
- ``learner``: the networks, the critic and gradient steps shared by ranks.
- ``divergence``: KL divergences from the model before any reward.
- ``reward_method``, ``methods``: the base class and the registry of ``dppo``, ``ddpo``, ``mixed`` and ``rwr``.
- ``settings``, ``setup``, ``loop``, ``checkpoint``, ``evaluation``: one fine-tuning run from beginning to end.
"""
