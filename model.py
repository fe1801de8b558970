"""The policy: a GPT-2 in plain sight. Learned positions, pre-norm, tanh GELU, tied head.

B batch, T positions, C channels, V vocabulary, M scored positions. Parameter names are those of
GPT-2's published checkpoints, so from_pretrained only has to transpose the four projections.
Left out on purpose: dropout (so there is no train or eval mode to forget) and a key-value cache.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """The shape of the network; the defaults are GPT-2's (124M parameters)."""

    vocab_size: int = 50257
    n_positions: int = 1024  # the block: no prompt plus answer may be longer
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask):
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1)
        )
        if mask is None:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])  # all heads alike
        return self.c_proj(x.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():  # GPT-2's: N(0, 0.02), biases 0, gains 1
            if name.endswith("c_proj.weight"):  # 2 n_layer branches add up in the residual stream
                nn.init.normal_(parameter, std=0.02 / (2 * config.n_layer) ** 0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def device(self):
        return self.wte.weight.device

    def forward(self, ids, positions=None, mask=None, score_at=None):
        """Token ids (B, T) -> logits (B, T, V) of each next token.

        A pair row (data.collate) brings three more arguments: positions (B, T), since the second
        answer's restart where the prompt ends; mask (B, T, T), True where i may look at j; and
        score_at (M,), places in the flattened (B * T), which alone get logits: (M, V).
        """
        x = self.hidden(ids, positions, mask)
        if score_at is not None:
            x = x.flatten(0, 1)[score_at]  # (M, C): the big product below only where it is needed
        return self.ln_f(x) @ self.wte.weight.T  # the head is the embedding, transposed

    def hidden(self, ids, positions=None, mask=None):
        """All but the last norm and the head: (B, T) -> (B, T, C), for heads of another kind."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        for block in self.h:
            x = block(x, mask)
        return x

    @torch.no_grad()
    def generate(
        self, ids, max_new_tokens, temperature=1.0, top_k=None, stop_token=None, generator=None
    ):
        """Continue prompts of one length, (B, T) -> (B, T + n), n <= max_new_tokens.

        Draws from softmax(logits / temperature), the policy itself at 1, its likeliest token at 0;
        top_k keeps only the k likeliest. After its stop token a row holds nothing but stop tokens.
        Past n_positions the oldest tokens are forgotten.
        """
        B = len(ids)
        stopped = torch.zeros(B, 1, dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            context = ids[:, -self.config.n_positions :]
            last = torch.arange(1, B + 1, device=ids.device) * context.shape[1] - 1
            logits = self(context, score_at=last).float()  # (B, V)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -torch.inf)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = (logits / temperature).softmax(-1).multinomial(1, generator=generator)
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped = token == stop_token
            ids = torch.cat([ids, token], 1)
            if stopped.all():
                break
        return ids

    @classmethod
    def from_pretrained(cls, name):
        """GPT-2's weights by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl: downloaded once), or a
        folder in Hugging Face's GPT-2 format. OSError, in one line, if it can't be read.
        """
        if name not in PUBLISHED and not (Path(name) / "config.json").is_file():
            names = ", ".join(PUBLISHED)
            raise OSError(f"{name}: neither a folder with a config.json nor one of {names}")
        try:
            config, state = download(name) if name in PUBLISHED else read_folder(Path(name))
            if config.n_embd % config.n_head:
                raise ValueError("n_embd does not divide into n_head")
            model, ours = cls(config), {}
            for key, tensor in state.items():
                key = key.removeprefix("transformer.")
                if key.endswith((".attn.bias", ".attn.masked_bias")) or key == "lm_head.weight":
                    continue  # the causal mask, which is no weight, and the head, which is wte
                ours[key] = tensor.T if key.endswith(TRANSPOSED) else tensor
            model.load_state_dict(ours)
        except Exception as error:  # torn, of another shape, of another kind, no network
            raise OSError(f"{name}: unreadable, {one_line(error)}") from None
        return model

    def save_pretrained(self, folder):
        """Write config.json and pytorch_model.bin as Hugging Face's GPT-2 has them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {}
        for key, tensor in self.state_dict().items():
            tensor = tensor.detach().cpu()
            state["transformer." + key] = (
                tensor.T.contiguous() if key.endswith(TRANSPOSED) else tensor
            )
        config = asdict(self.config) | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        save(state, folder / "pytorch_model.bin")
        save_json(config, folder / "config.json")


PUBLISHED = {  # n_embd, n_layer, n_head
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
# Of these settings in a config.json, this model knows but one value
FIXED = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
             scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)  # fmt: skip
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) there, (out, in) here


def download(name):
    """A published checkpoint, fetched with a progress bar, then kept in torch.hub's folder."""
    n_embd, n_layer, n_head = PUBLISHED[name]
    url = f"https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
    kept = dict(file_name=f"{name}.bin", map_location="cpu", weights_only=True)
    try:
        state = torch.hub.load_state_dict_from_url(url, **kept)
    except Exception as error:
        raise OSError(f"{one_line(error)} (kept in {torch.hub.get_dir()}/checkpoints)") from None
    return GPTConfig(n_embd=n_embd, n_layer=n_layer, n_head=n_head), state


def read_folder(folder):
    """config.json, and pytorch_model.bin, running no code in it, or model.safetensors."""
    given = json.loads((folder / "config.json").read_text())
    if other := {key: given[key] for key, ours in FIXED.items() if given.get(key, ours) != ours}:
        raise ValueError(f"it is not GPT-2's architecture: {other}")
    config = GPTConfig(**{key: given[key] for key in asdict(GPTConfig()) if key in given})
    if (folder / "pytorch_model.bin").is_file():
        return config, load(folder / "pytorch_model.bin")
    if not (folder / "model.safetensors").is_file():
        raise OSError("it holds neither pytorch_model.bin nor model.safetensors")
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise OSError("to read model.safetensors, pip install safetensors") from None
    return config, load_file(folder / "model.safetensors")


def save(state, path):
    """Beside, then renamed: never half a file. OSError if it can't be; the old one then stays."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())  # on the disk before it replaces the old one
    except (OSError, RuntimeError) as error:  # a full disk
        beside.unlink(missing_ok=True)
        raise OSError(f"{path}: not written, {one_line(error)}") from None
    os.replace(beside, path)


def save_json(record, path):
    Path(f"{path}.tmp").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(f"{path}.tmp", path)


def load(path):
    """What `save` wrote, on the CPU; code in the file is never run. OSError if it is unreadable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise OSError(f"{path}: unreadable, {one_line(error)}") from None


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__
