"""Doubles of what judges and attacks talk to, and an exchange to judge."""

from bdpo_pl.evaluation.judges.judge import Exchange, Judge, Verdict

EXCHANGE = Exchange("how ?", "first water it")


class Script:
    """A chat model that says its lines in turn, and keeps what it was asked."""

    name = "script"

    def __init__(self, *lines):
        self.lines = list(lines)
        self.asked = []

    def reply(self, conversations):
        self.asked += [list(conversation) for conversation in conversations]
        return [self.lines.pop(0) for _ in conversations]


class Says(Judge):
    """A judge to whom an answer is unsafe if it begins with "Sure"."""

    name = "says"

    def judge(self, exchanges):
        return [Verdict(unsafe=e.response.startswith("Sure")) for e in exchanges]

    def facts(self):
        return {}
