"""`python -m e2e.clusters`: test clusters from a shell.

Only shell code goes to standard output: `eval "$(python -m e2e.clusters up)"` sets KUBECONFIG and
PATH.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from e2e.clusters.home import home
from e2e.clusters.providers import PROVIDERS, choose
from e2e.clusters.shell import ClusterError

# Each is a method of Cluster that takes a node.
NODE_COMMANDS = ("power-off", "power-on", "partition", "heal", "drain", "uncordon")


def main(arguments: list[str]) -> int:
    """Run one command; 0, or 1 with the reason on standard error."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        _run(options)
    except (ClusterError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.command == "list":
        for folder in sorted((home() / "clusters").glob("*")):
            print(folder.name, "up" if choose(folder.name, "netns").is_up() else "incomplete")
        for folder in sorted((home() / "kind").glob("*")):
            print(folder.name, "up" if choose(folder.name, "kind").is_up() else "incomplete")
        return
    cluster = choose(options.name, options.provider)
    if options.command == "up":
        if not cluster.is_up():
            cluster.up(options.nodes)
        print(cluster.shell_exports())
    elif options.command == "down":
        cluster.down()
    elif options.command == "load":
        archive = Path(options.image)
        cluster.load_image(archive if archive.is_file() else options.image)
    else:
        getattr(cluster, options.command.replace("-", "_"))(options.node)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="dstrain", help="of the cluster (default: dstrain)")
    common.add_argument("--provider", choices=PROVIDERS, default="auto")
    parser = argparse.ArgumentParser(prog="python -m e2e.clusters", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", parents=[common], help="start a cluster; print its variables")
    up.add_argument("--nodes", type=int, default=3)
    commands.add_parser("down", parents=[common], help="stop a cluster and remove all of it")
    commands.add_parser("list", help="the clusters of this user")
    load = commands.add_parser("load", parents=[common], help="give an image to all nodes")
    load.add_argument("image", help="name in the local store, or a docker-archive file")
    for name in NODE_COMMANDS:
        command = commands.add_parser(name, parents=[common], help=f"{name} a node")
        command.add_argument("node")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
