"""The policy: a GPT-2 in plain sight. Learned positions, pre-norm, tanh GELU, tied head.

B batch, T positions, C channels, V vocabulary, N scored places. Parameters are named as in GPT-2's
published checkpoints. Left out on purpose: dropout (so there is no train or eval mode to forget), a
key-value cache, and a padding mask: padding is on the right, where causal attention never looks.
"""

import json
import os
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """The shape of the network and its end token. The defaults are GPT-2's (124M parameters)."""

    vocab_size: int = 50257
    n_positions: int = 1024  # no prompt plus response may be longer
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    eos_token_id: int = 50256  # the tokenizer's; not always the last id


PUBLISHED = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16),  # n_embd, n_layer, n_head
             "gpt2-large": (1280, 36, 20), "gpt2-xl": (1600, 48, 25)}  # fmt: skip


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        assert C % config.n_head == 0, f"n_embd {C} is not a multiple of n_head {config.n_head}"
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x, at=None):
        """x (B, T, C) -> (B, T, C); at N places `at` in the flattened (B * T) only: (N, C)."""
        B, T, C = x.shape
        qkv = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, C / n_head)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(B, T, C)
        if at is not None:  # nothing below mixes places
            x, mixed = x.flatten(0, 1)[at], mixed.flatten(0, 1)[at]
        x = x + self.attn.c_proj(mixed)
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():  # GPT-2's: N(0, 0.02), biases 0, gains 1
            if parameter.dim() == 2:  # smaller in c_proj: 2 n_layer of its outputs add up in x
                terms = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / terms**0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def device(self):
        return self.wte.weight.device

    def forward(self, ids, at=None):
        """ids (B, T) -> next-token logits (B, T, V); at N places `at` in (B * T) only: (N, V)."""
        x = self.hidden(ids, at)
        return self.ln_f(x) @ self.wte.weight.T  # the head is the embedding, transposed

    def hidden(self, ids, at=None):
        """All but the last norm and the head, for other heads: (B, T, C), or (N, C) at `at`."""
        assert ids.shape[1] <= self.config.n_positions, (ids.shape, self.config.n_positions)
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h[:-1]:
            x = block(x)
        return self.h[-1](x, at)  # the last block and the head only where they are asked for

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=1.0, stop_token=None, generator=None):
        """Continue prompts of equal length: ids (B, T) -> (B, T + n), n <= max_new_tokens.

        Draws from softmax(logits / temperature): 1 is the policy itself, 0 the likeliest token.
        After a drawn `stop_token` a row is all stop tokens. The last n_positions tokens are seen.
        """
        stopped = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            context = ids[:, -self.config.n_positions :]
            last = torch.arange(1, len(ids) + 1, device=ids.device) * context.shape[1] - 1  # (B,)
            logits = self(context, last).float()  # (B, V)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                token = (logits / temperature).softmax(-1).multinomial(1, generator=generator)
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped = token == stop_token
            ids = torch.cat([ids, token], dim=1)
            if stopped.all():
                break
        return ids

    @classmethod
    def from_pretrained(cls, name):
        """From a name in PUBLISHED (downloaded once) or a folder in Hugging Face's GPT-2 format.
        OSError, in one line, if it cannot be read or is no GPT-2.
        """
        with os_error(f"{name} is unreadable"):
            config, state = read(name)
            state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
            head = state.pop("lm_head.weight", None)
            if head is not None and not torch.equal(head, state.setdefault("wte.weight", head)):
                raise ValueError("lm_head.weight differs from the embedding; here the two are tied")
            masks = ".attn.bias", ".attn.masked_bias"  # the causal mask is no weight
            state = {k: v for k, v in transposed(state).items() if not k.endswith(masks)}
            model = cls(config)
            model.load_state_dict(state)
        return model

    def complete(self, prompt, tokenizer):
        """The likeliest continuation of a prompt (token ids), at most 100 tokens, as text."""
        ids = torch.tensor([prompt], device=self.device)
        ids = self.generate(ids, 100, temperature=0, stop_token=tokenizer.eot_token)
        text = b""
        for token in ids[0, len(prompt) :].tolist():
            with suppress(KeyError):  # some vocabularies have ids without a text
                text += tokenizer.decode_single_token_bytes(token)
        return text.decode(errors="replace")

    def save_pretrained(self, folder):
        """Write pytorch_model.bin and config.json in Hugging Face's GPT-2 format, or OSError."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"transformer.{k}": v.cpu() for k, v in self.state_dict().items()}
        save(transposed(state), folder / "pytorch_model.bin")
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | asdict(self.config)
        save_json(config | {"bos_token_id": config["eos_token_id"]}, folder / "config.json")
        for stale in [*folder.glob("*.safetensors*"), folder / "generation_config.json"]:
            stale.unlink(missing_ok=True)  # transformers would prefer it to ours


def read(name):
    """The config and the weights as they are in the files."""
    if name in PUBLISHED:
        url = f"https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
        kept = dict(file_name=f"{name}.bin", map_location="cpu", weights_only=True)
        with os_error(f"{torch.hub.get_dir()}/checkpoints/{name}.bin (if torn, delete it)"):
            config = GPTConfig(50257, 1024, *PUBLISHED[name])
            return config, torch.hub.load_state_dict_from_url(url, **kept)
    folder = Path(name)
    given = json.loads((folder / "config.json").read_text())
    fixed = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                 scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)  # fmt: skip
    if other := {key: given[key] for key in fixed if given.get(key, fixed[key]) != fixed[key]}:
        raise ValueError(f"not GPT-2's architecture: {other}")
    config = GPTConfig(**{key: given[key] for key in asdict(GPTConfig()) if key in given})
    if not (folder / "model.safetensors").is_file():
        return config, load(folder / "pytorch_model.bin")
    from safetensors.torch import load_file  # preferred to the other file, as in transformers
    return config, load_file(folder / "model.safetensors")


def transposed(state):
    kinds = "c_attn.weight", "c_proj.weight", "c_fc.weight"  # files: (in, out); Linear: (out, in)
    return {k: v.T.contiguous() if k.endswith(kinds) else v for k, v in state.items()}


def save(state, path, write=None):
    """Write a temporary file, then rename it: never half a file. On OSError the old one stays."""
    try:
        with os_error(f"{path} is not written"), open(f"{path}.tmp", "wb") as file:
            (write or torch.save)(state, file)
            file.flush()
            with suppress(OSError):  # some file systems have no fsync
                os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)


def save_json(record, path):
    save(json.dumps(record, indent=2) + "\n", path, lambda text, file: file.write(text.encode()))


def load(path):
    """What `save` wrote, on the CPU. Code in the file never runs. OSError if it is unreadable."""
    with os_error(f"{path} is unreadable"):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def os_error(what):
    """Any error inside becomes an OSError of one line: `what`, then why."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(f"{what}: {why}") from None
