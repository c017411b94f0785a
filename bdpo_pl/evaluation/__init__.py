"""Safety evaluation of models by their answers: suites of prompts, attacks, judges, and the resulting rates.

`suites` defines the prompts, `attacks` modifies them, `judges` classifies the answers, and `measures` computes the
rates. `bdpo_pl.evaluate` combines them on the command line, `bdpo_pl.training.safety_probe` during training.
"""
