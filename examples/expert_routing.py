"""Give each request the expert that it needs: a small Llama, three experts, and a router trained on its hidden states.

python expert_routing.py

The weights are drawn, not trained, so the answers mean nothing; what counts is that each request meets the weights that
are meant for it, and that the model ends with the bits it began with. Requests are grouped by expert, since the weights
are switched in place.
"""

from collections import defaultdict

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastmerge
from fastmerge.experts import ExpertSet, extract_expert
from fastmerge.routers import MLPRouter, pool

TASKS = {"math": (10, 40), "code": (40, 70), "chat": (70, 100)}
"""Which tokens the requests of each task are made of."""


def make_models() -> tuple[LlamaForCausalLM, dict[str, dict[str, torch.Tensor]]]:
    """A base and a fine-tune for each task."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config).bfloat16()
    tuned = {}
    for task in TASKS:
        tuned[task] = {name: x + (0.01 * torch.randn(x.shape)).bfloat16() for name, x in base.state_dict().items()}
        tuned[task]["lm_head.weight"] = tuned[task]["model.embed_tokens.weight"]
    return base, tuned


def requests(task: str, count: int, seed: int) -> torch.Tensor:
    """Some requests of a task: tokens [count, 12]."""
    low, high = TASKS[task]
    return torch.randint(low, high, (count, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def main() -> None:
    """Merge, extract, train the router, and answer requests."""
    model, tuned = make_models()
    base = {name: x.clone() for name, x in model.state_dict().items()}
    merged = fastmerge.merge(list(tuned.values()), base=base, method="task_arithmetic", weight=0.3)
    model.load_state_dict(merged)
    experts = ExpertSet(model, {task: extract_expert(base, state, keep=0.05) for task, state in tuned.items()})
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def pooled(tokens: torch.Tensor) -> torch.Tensor:
        return pool(model.model(tokens).last_hidden_state)

    router = MLPRouter(experts.names, width=64)
    known = torch.cat([pooled(requests(task, 20, seed=1)) for task in TASKS])
    print(f"router: {router.fit(known, [task for task in TASKS for _ in range(20)]):.0%} of the known requests")

    incoming = torch.cat([requests(task, 4, seed=2) for task in TASKS])
    groups = defaultdict(list)
    for number, weights in enumerate(router.route(pooled(incoming))):
        groups[tuple(weights.items())].append(number)
    for weights, members in groups.items():
        with experts.active(dict(weights)):
            answers = model(incoming[members]).logits[:, -1].argmax(dim=-1)
        print(f"{dict(weights)}: requests {members}, next tokens {answers.tolist()}")

    mixed = router.route(pooled(incoming[:1]), mixed=True, temperature=20.0)[0]
    with experts.active(mixed):
        model(incoming[:1])
    print("mixed:", {name: round(weight, 2) for name, weight in mixed.items()})
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    print("the model has its own bits again")


if __name__ == "__main__":
    main()
