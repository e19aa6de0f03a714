"""lm-evaluation-harness on this engine: an `LM` by the name of `nemo_star`, and a tool that runs tasks with it.

    torchrun --nproc-per-node 4 -m nemo_star harness checkpoint=llama31 tasks=[niah_single_1] output=results

In Python, on all ranks alike (`lead` gives the results on rank 0):

    import lm_eval
    from nemo_star import LLM
    from nemo_star.evaluation.harness.model import NemoStar

    lm = NemoStar(LLM("llama31", attention={"block_size": 32768}))
    results = lm.lead(lambda: lm_eval.simple_evaluate(model=lm, tasks=["niah_single_1"]))
"""
