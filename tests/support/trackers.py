"""Stand-ins for trackers whose packages are not needed: each appends what it gets to a list of calls."""

from types import SimpleNamespace

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger


class Wandb(WandbLogger):
    def __init__(self, calls):
        self.calls = calls

    @property
    def experiment(self):
        return SimpleNamespace(id="run7", log_artifact=lambda *args, **named: self.calls.append((args, named)))

    def log_hyperparams(self, params):
        self.calls.append(params)

    def log_text(self, *args, **named):
        self.calls.append((args, named))


class Mlflow(MLFlowLogger):
    def __init__(self, calls):
        self.calls = calls

    run_id = "abc"

    @property
    def experiment(self):
        def take(*args):
            self.calls.append(args)

        return SimpleNamespace(log_artifact=take, log_dict=take)

    def log_hyperparams(self, params):
        self.calls.append(params)


class TensorBoard(TensorBoardLogger):
    def __init__(self, calls):
        self.calls = calls

    @property
    def experiment(self):
        return SimpleNamespace(add_text=lambda *args: self.calls.append(args))
