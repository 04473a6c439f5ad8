"""From prompts to scored groups: the engine protocol, rollout groups, evaluation, and the engine in this process."""
