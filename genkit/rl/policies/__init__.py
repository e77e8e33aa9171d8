"""Trained runs that act.

- ``policy``, ``planner``: chunks of actions, or plans, given observations.
- ``inverse_dynamics``: the actions between planned states.
- ``execution``: a policy whose decisions take time.
- ``episodes``: episodes of any policy in any environment.
- ``rollout``: episodes of a run, with a summary, pictures and files.
- ``q_function``, ``best_of_n``: a Q-function learned from episodes, and the best of several samples by it.
- ``plots``: sampled actions and plans.
"""
