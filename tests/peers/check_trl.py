"""Our losses against TRL's own, through its trainer where it has the loss (written for trl 1.16).

    pip install -r tests/peers/requirements.txt && python -m pytest tests/peers/check_trl.py

Where TRL differs from the paper, the test says so and shows both values.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import tokenizers
import torch
import transformers
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import dpo
from experiments import losses as more
from model import GPT

BETA = 0.3
TEXTS = [  # responses of 1 to 4 words, prompts of 1 to 3
    {"prompt": "a b", "chosen": " c d e", "rejected": " f"},
    {"prompt": "c", "chosen": " a", "rejected": " b b a d"},
    {"prompt": "e f a", "chosen": " d d", "rejected": " c f e"},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy, another reference, a tokenizer; the pairs as TRL and as we read them."""
    folder = tmp_path_factory.mktemp("peers")
    words = {word: i for i, word in enumerate("<end> a b c d e f".split())}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    end = {"eos_token": "<end>", "pad_token": "<end>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **end)
    shape = dict(
        bos_token_id=0, eos_token_id=0, vocab_size=7, n_positions=16, n_embd=16, n_layer=2, n_head=2
    )
    config = transformers.GPT2Config(**shape, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    models = []
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        models.append(model)
    texts = [{side: [words[w] for w in text.split()] for side, text in t.items()} for t in TEXTS]
    rows = [data.TokenPair(x["prompt"], x["chosen"] + [0], x["rejected"] + [0]) for x in texts]
    (ids, mask), logps = data.collate(rows, range(len(rows))), []
    for name in ("policy", "reference"):
        with torch.no_grad():
            both = dpo.response_logps(GPT.from_pretrained(folder / name), ids, mask)
            logps += both.chunk(2)  # chosen, rejected
    lengths = torch.tensor([[len(row.chosen) for row in rows], [len(row.rejected) for row in rows]])
    return SimpleNamespace(
        models=models, tokenizer=tokenizer, logps=logps, lengths=lengths, folder=folder
    )


def trl_loss(world, loss_type, **settings):
    """The mean loss of the pairs, as DPOTrainer evaluates it."""
    where = dict(output_dir=str(world.folder / "out"), use_cpu=True, report_to=[], bf16=False)
    config = trl.DPOConfig(
        **where, loss_type=[loss_type], beta=BETA, per_device_eval_batch_size=3, **settings
    )
    pairs = datasets.Dataset.from_list(TEXTS)
    policy, reference = world.models
    trainer = trl.DPOTrainer(
        policy, reference, config, None, pairs, pairs, processing_class=world.tokenizer
    )
    return trainer.evaluate()["eval_loss"]


def test_dpo(world):
    ours = dpo.dpo_loss(*world.logps, beta=BETA).losses
    assert (ours - 0.6931).abs().max() > 0.1, "policy and reference differ"
    assert ours.mean().item() == pytest.approx(trl_loss(world, "sigmoid"), rel=1e-4)


def test_hinge(world):
    ours = dpo.hinge_loss(*world.logps, beta=BETA).mean().item()
    assert ours == pytest.approx(trl_loss(world, "hinge"), rel=1e-4)


def test_robust(world):
    ours = dpo.robust_loss(*world.logps, beta=BETA, epsilon=0.2).mean().item()
    assert ours == pytest.approx(trl_loss(world, "robust", label_smoothing=0.2), rel=1e-4)


def test_ipo_of_trl_takes_means(world):
    """TRL divides each log-ratio by its length first; the paper, and we, take the sums."""
    (w, l), means = world.lengths, world.logps
    means = [logps / n for logps, n in zip(world.logps, (w, l, w, l))]
    theirs = trl_loss(world, "ipo")
    assert dpo.ipo_loss(*means, beta=BETA).mean().item() == pytest.approx(theirs, rel=1e-4)
    assert dpo.ipo_loss(*world.logps, beta=BETA).mean().item() != pytest.approx(theirs, rel=0.1)


def test_sigmoid_of_trl_ignores_label_smoothing(world):
    """So it is no cDPO. CPO's sigmoid has that formula, given log-ratios in place of log-probs."""
    plain = dpo.dpo_loss(*world.logps, beta=BETA).losses.mean().item()
    assert trl_loss(world, "sigmoid", label_smoothing=0.2) == pytest.approx(plain, rel=1e-4)
    policy_w, policy_l, ref_w, ref_l = world.logps
    theirs = cpo("sigmoid", policy_w - ref_w, policy_l - ref_l, label_smoothing=0.2)
    ours = dpo.cdpo_loss(*world.logps, beta=BETA, epsilon=0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def cpo(loss_type, chosen, rejected, beta=BETA, simpo_gamma=0.0, label_smoothing=0.0):
    settings = dict(beta=beta, simpo_gamma=simpo_gamma, label_smoothing=label_smoothing, alpha=0.0)
    device = SimpleNamespace(device="cpu")
    trainer = SimpleNamespace(loss_type=loss_type, accelerator=device, **settings)
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


def test_simpo(world):
    """TRL's simpo is given means; its gamma is absolute, as in ours. Its sigmoid_norm, in DPO, is
    no SimPO: it keeps the reference and has no gamma."""
    means = [logps / n for logps, n in zip(world.logps, world.lengths)]
    theirs = cpo("simpo", *means, beta=2.0, simpo_gamma=0.7)
    ours = more.simpo_loss(*world.logps, *world.lengths, beta=2.0, gamma=0.7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_orpo(world):
    """The odds-ratio term, which TRL returns with the other sign; the SFT term it takes over all
    tokens of a batch, ours is the mean over each response, so that each pair has a loss."""
    means = [logps / n for logps, n in zip(world.logps, world.lengths)]
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    ours = more.orpo_loss(*world.logps, *world.lengths, alpha=0.1) + means[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
