"""TRL's DPOTrainer as a contender of experiments/bench.py; needs tests/peers/requirements.txt."""

import threading
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
from trl import DPOConfig, DPOTrainer


def trl(rows, folder, vocab, config):
    """TRL's DPOTrainer on TokenPairs, in their order, with its defaults but for `config`: yields
    losses. Its tokenizer reads token numbers as words, so that all train on equal tokens."""
    words = {str(i): i for i in range(vocab)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    end = dict(eos_token=str(vocab - 1), pad_token=str(vocab - 1))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **end)
    texts = [  # TRL adds the end token to responses
        {"prompt": " ".join(map(str, row.prompt)),
         "chosen": "".join(f" {i}" for i in row.chosen[:-1]),
         "rejected": "".join(f" {i}" for i in row.rejected[:-1])}
        for row in rows
    ]  # fmt: skip
    models = []
    for _ in range(2):
        model = transformers.GPT2LMHeadModel.from_pretrained(folder)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        models.append(model)

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.parts.append(loss)  # each is divided by the number of parts already
            return loss

    config = DPOConfig(
        output_dir=str(Path(folder) / "trl"), lr_scheduler_type="constant",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, **config,
    )  # fmt: skip
    trainer = InOrder(models[0], models[1], config, None, datasets.Dataset.from_list(texts),
                      processing_class=tokenizer)  # fmt: skip
    trainer.parts = []
    yield from steps_of(trainer)


def steps_of(trainer):
    """Turn trainer.train(), which calls us back, into a generator that we call."""
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            go.acquire()

        def on_step_end(self, *args, **kwargs):
            done.release()

    def train():
        try:
            trainer.train()
        finally:
            done.release()  # after an error too, so that nobody waits for the next step

    trainer.add_callback(Turns())
    threading.Thread(target=train, daemon=True).start()
    while True:
        go.release()
        done.acquire()
        yield sum(trainer.parts).detach()
        trainer.parts.clear()
