"""Transformers' Trainer with every optimizer name that it takes from here: class, bits, training a tiny model."""

import pytest
import torch

import bitsandbytes as bnb

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

# name -> (class, bits of the state)
NAMES = {
    "adamw_bnb_8bit": ("AdamW", 8),
    "adamw_8bit": ("AdamW", 8),
    "paged_adamw_32bit": ("AdamW", 32),
    "paged_adamw_8bit": ("AdamW", 8),
    "ademamix": ("AdEMAMix", 32),
    "ademamix_8bit": ("AdEMAMix", 8),
    "paged_ademamix_32bit": ("AdEMAMix", 32),
    "paged_ademamix_8bit": ("AdEMAMix", 8),
    "lion_32bit": ("Lion", 32),
    "lion_8bit": ("Lion", 8),
    "paged_lion_32bit": ("Lion", 32),
    "paged_lion_8bit": ("Lion", 8),
    "rmsprop_bnb": ("RMSprop", 32),
    "rmsprop_bnb_8bit": ("RMSprop", 8),
    "rmsprop_bnb_32bit": ("RMSprop", 32),
}


class Memorise(torch.nn.Module):
    """Predict the next of 32 tokens; the embedding is large enough for 8-bit state, and must not get it."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(32, 256)
        self.layer = torch.nn.Linear(256, 32)

    def forward(self, input_ids, labels):
        logits = self.layer(self.embedding(input_ids))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("name", NAMES)
def test_trainer(name, tmp_path):
    torch.manual_seed(0)
    tokens = torch.arange(32).repeat(16, 1)
    data = [{"input_ids": row, "labels": row.roll(-1)} for row in tokens]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        optim=name,
        learning_rate=1e-3,
        max_steps=10,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = transformers.Trainer(model=Memorise(), args=arguments, train_dataset=data)
    result = trainer.train()
    assert result.training_loss < 3.4  # log(32) is 3.47
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    family, bits = NAMES[name]
    assert isinstance(optimizer, getattr(bnb.optim, family))
    assert optimizer.args.optim_bits == bits
    dtypes = {key: optimizer.state[p]["state1"].dtype for key, p in trainer.model.named_parameters()}
    assert dtypes["layer.weight"] == (torch.uint8 if bits == 8 else torch.float32)
    assert dtypes["embedding.weight"] == torch.float32
    assert dtypes["layer.bias"] == torch.float32
