"""The policy: GPT-2, written out. Learned positions, pre-norm, tanh GELU, tied head.

B batch, T positions, C channels, V vocabulary, N scored positions. Parameters are named as in
GPT-2's published checkpoints. Left out on purpose: dropout (so there is no train or eval mode to
forget), a key-value cache, and a padding mask: padding is on the right, where causal attention
never looks.
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
    """The shape of the network and its end token. The defaults are GPT-2's (124M parameters)."""

    vocab_size: int = 50257
    n_positions: int = 1024  # the longest prompt and response together
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    eos_token_id: int = 50256  # the tokenizer's end token, which is not always the last id


class Attention(nn.Module):
    """Causal self-attention: each position gathers from itself and earlier positions."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        assert C % config.n_head == 0, f"n_embd {C} is not a multiple of n_head {config.n_head}"
        self.n_head = config.n_head
        self.c_attn = nn.Linear(C, 3 * C)
        self.c_proj = nn.Linear(C, C)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, C / n_head)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Applied to each position separately."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C)
        self.c_proj = nn.Linear(4 * C, C)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """As in GPT-2: weights with a standard deviation of 0.02, biases 0; gains are 1 already."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for block in self.h:  # 2 n_layer outputs of c_proj add up in the residual stream
            block.attn.c_proj.weight /= (2 * self.config.n_layer) ** 0.5
            block.mlp.c_proj.weight /= (2 * self.config.n_layer) ** 0.5

    @property
    def device(self):
        return self.wte.weight.device

    def forward(self, ids, scored=None):
        """ids (B, T) -> next-token logits (B, T, V), or (N, V) at the positions in `scored` only.

        `scored` is a boolean mask (B, T), best on the CPU: with a mask on a GPU the program must
        wait for the GPU to learn how large N is.
        """
        x = self.hidden(ids)
        if scored is not None:
            x = x[scored]
        return self.head(x)

    def hidden(self, ids):
        """Everything below the last LayerNorm: ids (B, T) -> (B, T, C). Other heads can follow."""
        B, T = ids.shape
        assert T <= self.config.n_positions, f"{T} tokens in a block of {self.config.n_positions}"
        x = self.wte(ids) + self.wpe.weight[:T]
        for block in self.h:
            x = block(x)
        return x

    def head(self, x):
        """(..., C) -> logits (..., V), in at least float32, even under autocast.

        GPT-2's logits are around -100, where neighbouring bfloat16 numbers are 0.5 apart.
        """
        x = self.ln_f(x)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return x.to(dtype) @ self.wte.weight.to(dtype).T  # the embedding, transposed

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=1.0, stop_token=None, generator=None):
        """Continue prompts of equal length: ids (B, T) -> (B, T + n), n <= max_new_tokens.

        Draws from softmax(logits / temperature): 1 is the policy itself, 0 the likeliest token.
        Once a row has drawn `stop_token`, it is filled up with it. The model sees the last
        n_positions tokens only.
        """
        stopped = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            context = ids[:, -self.config.n_positions :]
            logits = self.head(self.hidden(context)[:, -1])  # (B, V)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                probs = (logits / temperature).softmax(-1)
                token = probs.multinomial(1, generator=generator)
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

        OSError, in one line, if it cannot be read or is not a GPT-2.
        """
        published = published_name(name)
        if published:
            config, state = read_published(published)
        else:
            config, state = read_folder(Path(name))
        state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
        for key in list(state):
            if key.endswith((".attn.bias", ".attn.masked_bias")):
                del state[key]  # old checkpoints store the causal mask
        head = state.pop("lm_head.weight", None)
        if head is not None:
            embedding = state.setdefault("wte.weight", head)  # some files hold one of the two
            if not torch.equal(head, embedding):
                raise OSError(f"{name}: its lm_head differs from its embedding; here they are tied")
        model = cls(config)
        try:
            model.load_state_dict(transposed(state))
        except RuntimeError as error:
            raise OSError(f"{name}: the weights do not match config.json") from error
        return model

    def save_pretrained(self, folder):
        """Write pytorch_model.bin and config.json in Hugging Face's GPT-2 format.

        config.json is written last: where it is, the weights are complete.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"transformer.{name}": weight.cpu() for name, weight in self.state_dict().items()}
        save(transposed(state), folder / "pytorch_model.bin")
        for stale in [*folder.glob("*.safetensors*"), folder / "generation_config.json"]:
            stale.unlink(missing_ok=True)  # of an older model, and read before the new files
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        config |= asdict(self.config)
        config["bos_token_id"] = self.config.eos_token_id
        save_json(config, folder / "config.json")


# Files

OPENAI = "openai-community"
OWNERS = {"distilgpt2": "distilbert"}  # on the hub, where it is not OPENAI
PUBLISHED = {  # n_embd, n_layer, n_head
    "distilgpt2": (768, 6, 12),
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
# Settings of a config.json that are fixed in the code above
ARCHITECTURE = {
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],  # two names of one function
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "tie_word_embeddings": [True],
}


def published_name(name):
    """The key in PUBLISHED that "gpt2" or "openai-community/gpt2" means; None for a folder.

    OSError if it is neither.
    """
    owner, _, published = str(name).rpartition("/")
    expected_owner = OWNERS.get(published, OPENAI)
    if published in PUBLISHED and owner in ("", expected_owner):
        return published
    if not Path(name).is_dir():
        raise OSError(f"{name} is neither a folder nor one of {', '.join(PUBLISHED)}")
    return None


def read_published(name):
    """The config and the weights of a model in PUBLISHED. Downloads it the first time."""
    owner = OWNERS.get(name, OPENAI)
    url = f"https://huggingface.co/{owner}/{name}/resolve/main/pytorch_model.bin"
    n_embd, n_layer, n_head = PUBLISHED[name]
    config = GPTConfig(n_embd=n_embd, n_layer=n_layer, n_head=n_head)
    try:
        state = torch.hub.load_state_dict_from_url(
            url, file_name=f"{name}.bin", map_location="cpu", weights_only=True
        )
    except Exception as error:  # no network, or a file that was cut short
        path = f"{torch.hub.get_dir()}/checkpoints/{name}.bin"
        why = f"{type(error).__name__}; if {path} is there, delete it"
        raise OSError(f"{url} cannot be loaded: {why}") from error
    return config, state


def read_folder(folder):
    """The config and the weights as they are stored in a folder."""
    path = folder / "config.json"
    try:
        given = dict(json.loads(path.read_text(encoding="utf-8")))
        config = GPTConfig(**{key: given[key] for key in asdict(GPTConfig()) if key in given})
    except (ValueError, TypeError) as error:
        raise OSError(f"{path} is not the config of a GPT-2") from error
    sizes = [config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head]
    if not all(type(size) is int and size > 0 for size in sizes) or config.n_embd % config.n_head:
        raise OSError(f"{path} has sizes that no GPT-2 can have: {config}")
    for key, values in ARCHITECTURE.items():
        if given.get(key, values[0]) not in values:
            why = f"{key} is {given[key]}, not {values[0]}"
            raise OSError(f"{path}: not GPT-2's architecture: {why}")
    safetensors = folder / "model.safetensors"
    if not safetensors.is_file():
        return config, load(folder / "pytorch_model.bin")
    from safetensors.torch import load_file

    try:
        return config, load_file(safetensors)
    except Exception as error:  # a damaged file can raise anything
        raise OSError(f"{safetensors} cannot be read: {type(error).__name__}") from error


def transposed(state):
    """GPT-2's files hold these weights as (in, out), nn.Linear as (out, in). Works both ways."""
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    turned = {}
    for name, weight in state.items():
        if name.endswith(linear):
            weight = weight.T.contiguous()
        turned[name] = weight
    return turned


def save(state, path):
    """Written under another name, then renamed, so that a crash never leaves half a file."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        disk_error = error.__context__  # which torch hides, such as "No space left on device"
        if isinstance(disk_error, OSError):
            raise OSError(f"{path} cannot be written: {disk_error}") from error
        raise
    os.replace(f"{path}.tmp", path)


def save_text(text, path):
    """The same for a text."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def save_json(record, path):
    save_text(json.dumps(record, indent=2) + "\n", path)


def load(path):
    """A file of tensors, on the CPU. Code in it is never run. OSError if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise OSError(f"{path} cannot be read: {type(error).__name__}") from error
