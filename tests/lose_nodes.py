"""Run a job on a simulated cluster and take a node away in the capture and another in the sweep. A process of its own,
since a test session has one cluster."""

import sys
import threading
import time
from pathlib import Path

import yaml
from small import SweepJob

import raysae.on_ray  # noqa: F401 sets Ray's environment before Ray is imported


def main(config: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    import raysae

    job = SweepJob.model_validate(yaml.safe_load(config.read_text()))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)

    def lose() -> None:
        for sign in ("stages/store-*/shards/*.json", "stages/sweep-*/history/*.jsonl"):
            while not list(job.output.glob(sign)):
                time.sleep(0.02)
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print("removed a node", flush=True)

    threading.Thread(target=lose, daemon=True).start()
    raysae.run_sweep(job)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
