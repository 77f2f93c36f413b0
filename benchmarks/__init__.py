"""Measurements behind the figures in the documents; each module says how to run it."""

from maetok.runtime.renamed import MovedCommands

MovedCommands(
    {
        "benchmarks.data": "benchmarks.loading.data",
        "benchmarks.demo_report": "tools.demo_report",
        "benchmarks.host_memory": "tools.plan.host_memory",
        "benchmarks.latents": "benchmarks.loading.latents",
        "benchmarks.mixtures": "tools.study.mixtures",
        "benchmarks.overhead": "benchmarks.speed.overhead",
        "benchmarks.photos": "benchmarks.loading.photos",
        "benchmarks.plan": "tools.plan",
        "benchmarks.sampling": "benchmarks.speed.sampling",
        "benchmarks.shuffle": "benchmarks.loading.shuffle",
        "benchmarks.study": "tools.study",
    }
).register()
