"""What torchrun does with a command line, in processes that are forked with everything imported."""

from children import serve, start
from elastic_ranks import fit
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser


def agent(node, commands, folder):
    """Do on node `node`, in a folder of its own, what its `torchrun` does with `commands[node]`: `bdpo_pl.fit`."""
    serve()
    own = folder / f"node_{node}"
    own.mkdir()
    config, _, arguments = config_from_args(get_args_parser().parse_args(commands[node]))
    assert arguments[1:3] == ["-m", "bdpo_pl.fit"], arguments
    config.start_method = "forkserver"
    config.monitor_interval = 0.05
    elastic_launch(config, fit)(own, arguments[3:])


def run_nodes(commands, folder):
    """Run the arguments of `torchrun` of all nodes at once, on this machine, each in its own folder below `folder`."""
    start(agent, (commands, folder), len(commands))
