"""Safety of models by what they answer: suites of prompts, attacks, judges, and the rates that come of them.

`suite` and `suites` say what is asked, `attacks` how it is wrapped, `judges` what an answer is taken for, `measures`
what is counted. `bdpo_pl.evaluate` puts them together on the command line, `bdpo_pl.safety_evaluation` in training.
"""
