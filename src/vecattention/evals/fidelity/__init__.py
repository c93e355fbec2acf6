"""Fidelity: how much of dense attention each method keeps, at which density, and how far its output is from dense.

    samples = synthetic(...) | testbed(...) | load("maps.safetensors")
    study(samples, Records("out/fidelity.jsonl"), Plan())      # rows; finished ones are skipped
    show.table(records), show.pareto(records, "pareto.png")

Definitions. Recall of a row: the dense softmax mass on its selected keys; of a head: the mean over rows. Density: kept
over allowed pairs. Output error: sum |o - o*| / sum |o*| (L1) and the root of the same with squares (L2), per head,
against dense attention o* in float64.
"""
