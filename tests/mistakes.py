"""Eq. 7 and Eq. 4 by hand, what usual mistakes make of them, and the comparison that names these.

test_dpo.py grades with it, and experiments/course.py checks what a reader of the notebook writes.
"""

import torch

f64 = torch.float64


def complaint(got, expected, why, tolerance=1e-12, mistakes=None):
    """What is wrong with `got`, as text; "" if it equals `expected` to within `tolerance`.

    The text begins with `why`. `mistakes` maps usual mistakes to the values that they give. If
    `got` is one of these, the text names the mistake.
    """
    got = torch.as_tensor(got, dtype=f64).detach()
    expected = torch.as_tensor(expected, dtype=f64).detach()
    if got.shape != expected.shape:
        shapes = f"got shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        return f"{why}\n  {shapes}; a mean or sum over pairs, or a kept dimension?"
    errors = (got - expected).abs()
    if errors.max() <= tolerance:  # False if any entry is NaN
        return ""

    text = why
    if got.numel() <= 8:
        text += f"\n  expected {expected.tolist()}\n  got      {got.tolist()}"
    else:  # show the worst entry only; argmax takes NaN for the largest
        worst = errors.argmax()
        text += f"\n  expected {expected.flatten()[worst]}\n  got      {got.flatten()[worst]}"
        text += f"\n  (the worst of {got.numel()} values)"
    if mistakes is None:
        mistakes = {}
    for mistake, values in mistakes.items():
        if torch.allclose(got, torch.as_tensor(values, dtype=f64), atol=1e-5):
            text += f"\n  This is what comes out if {mistake}."
    return text


# Eq. 7: two pairs that can be followed on paper, with beta = 1/2. A reward is beta (policy -
# reference).
#
#                     policy   reference   reward                       margin r_w - r_l
#   pair 0  chosen      -2        -3       r_w = 0.5 (-2 + 3) =  0.5
#           rejected    -4        -3       r_l = 0.5 (-4 + 3) = -0.5     1.0, ranked right
#   pair 1  chosen      -6        -3       r_w = 0.5 (-6 + 3) = -1.5
#           rejected    -1        -5       r_l = 0.5 (-1 + 5) =  2.0    -3.5, confidently wrong
BETA = 0.5
PAIRS = torch.tensor(
    [  # pair 0, pair 1
        [-2, -6],  # policy_chosen_logps
        [-4, -1],  # policy_rejected_logps
        [-3, -3],  # ref_chosen_logps
        [-3, -5],  # ref_rejected_logps
    ],
    dtype=f64,
)
LOSSES = torch.tensor([0.31326168751822286, 3.5297504182726205], dtype=f64)  # -log sigma(margin)
WEIGHTS = torch.tensor([0.2689414213699951, 0.9706877692486436], dtype=f64)  # sigma(-margin)


def losses_at(margin_0, margin_1):
    """-log sigma(margin) = log(1 + e^-margin), for the margins of pair 0 and pair 1."""
    margins = torch.tensor([margin_0, margin_1], dtype=f64)
    return (1 + (-margins).exp()).log()


# What Eq. 7 gives on these pairs if one thing is wrong. The comment above a row derives the margins
# that pair 0 and pair 1 then have.
EQ7_MISTAKES = {
    # -1.0 and 3.5
    "the sign of the margin is inverted, or chosen and rejected are exchanged": losses_at(-1, 3.5),
    # 1.0 and -3.5, as they should be
    "the minus before the log is missing": -LOSSES,
    # 0.5 (-2 + 4) and 0.5 (-6 + 1)
    "the reference is left out": losses_at(1, -2.5),
    # 0.5 ((-2 + 4) + (-3 + 3)) and 0.5 ((-6 + 1) + (-3 + 5))
    "the reference is added, or its chosen and rejected are exchanged": losses_at(1, -1.5),
    # 0.5 ((-4 + 2) - (-3 + 3)) and 0.5 ((-1 + 6) - (-3 + 5))
    "the policy's chosen and rejected are exchanged": losses_at(-1, 1.5),
    # (-2 + 4) - (-3 + 3) and (-6 + 1) - (-3 + 5)
    "beta is missing": losses_at(2, -7),
    # 0.5 * 1.0 and 0.5 * -3.5
    "beta is applied twice": losses_at(0.5, -1.75),
    # 2 / 0.5 and -7 / 0.5
    "beta divides": losses_at(4, -14),
    # 2 and -7
    "beta stands before the log": BETA * losses_at(2, -7),
    # 1.0 and -3.5, as they should be
    "beta stands before the log as well": BETA * LOSSES,
    # 0.5 (-2 + 4) - (-3 + 3) and 0.5 (-6 + 1) - (-3 + 5)
    "beta multiplies the policy's log-probs alone": losses_at(1, -4.5),
    # 0.5 (-2 / -3 - -4 / -3) and 0.5 (-6 / -3 - -1 / -5)
    "log-probs are divided, not subtracted": losses_at(-1 / 3, 0.9),
    # 1.0 and -3.5, as they should be; the loss is then -sigma(margin), which is sigma(-margin) - 1
    "the log is missing": WEIGHTS - 1,
}

# Eq. 4: two prompts with three responses each, again with beta = 1/2. The rewards are logarithms of
# small numbers, so that each step gives fractions.
#
#              pi_ref             exp(r / beta)    product           Z(x)   pi*
#   prompt 0   1/2, 1/4, 1/4      1, 2, 4          1/2, 1/2, 1        2     1/4, 1/4, 1/2
#   prompt 1   1/4, 1/4, 1/2      8, 4, 2          2, 1, 1            4     1/2, 1/4, 1/4
TILTS = torch.tensor([[1, 2, 4], [8, 4, 2]], dtype=f64)
REF_PROBS = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2]], dtype=f64)
PRODUCTS = torch.tensor([[1 / 2, 1 / 2, 1], [2, 1, 1]], dtype=f64)
NORMALISERS = torch.tensor([[2], [4]], dtype=f64)
OPTIMAL_PROBS = torch.tensor([[1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 4, 1 / 4]], dtype=f64)
EQ4_REF = REF_PROBS.log()
EQ4_REWARDS = BETA * TILTS.log()
EQ4_OPTIMUM = OPTIMAL_PROBS.log()
EQ4_LOG_Z = NORMALISERS[:, 0].log()


def log_shares(products):
    """log of each product's share in the sum of its row."""
    return (products / products.sum(-1, keepdim=True)).log()


# What Eq. 4 gives on these prompts if one thing is wrong
EQ4_MISTAKES = {
    "it is not divided by Z(x)": PRODUCTS.log(),
    # exp(r) is the root of exp(r / beta)
    "beta is missing": log_shares(REF_PROBS * TILTS**0.5),
    # exp(r beta) is its fourth root
    "beta multiplies the reward": log_shares(REF_PROBS * TILTS**0.25),
    "the sign of the reward is inverted": log_shares(REF_PROBS / TILTS),
    "the reference is left out": log_shares(TILTS),
    "Z(x) is subtracted, not its log": PRODUCTS.log() - NORMALISERS,
    "log Z(x) is added": PRODUCTS.log() + NORMALISERS.log(),
    "it is the probability, not its log": OPTIMAL_PROBS,
    "log pi_ref is used as if it were pi_ref": log_shares(EQ4_REF * TILTS),
    "the sum runs over the prompts": (PRODUCTS / torch.tensor([2.5, 1.5, 2.0])).log(),
    "the sum runs over the responses to all prompts": (PRODUCTS / 6).log(),
}
