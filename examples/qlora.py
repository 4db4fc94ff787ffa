"""QLoRA on a CPU: low-rank adapters, trained by AdamW8bit, over a Llama whose linear layers are frozen NF4 weights.

    python examples/qlora.py [--steps 100] [--base-steps 60] [--output FOLDER]

Needs transformers, accelerate and peft; downloads nothing.  The text is the Python standard library's sources as bytes.
A small Llama is made here and trained a little in float, saved, and loaded again with load_in_4bit; only the adapters
train from there.  Prints the loss, and the bytes that a frozen parameter takes.
Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import peft
import torch
import transformers

import bitsandbytes as bnb

BATCH, LENGTH = 8, 64
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def text(limit=2_000_000):
    """(training text, held-out text): ids 0..255, int64; the last twentieth is held out."""
    parts, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_bytes())
        total += len(parts[-1])
        if total > limit:
            break
    ids = torch.tensor(bytearray(b"\n".join(parts)), dtype=torch.uint8).long()
    return ids[: -len(ids) // 20], ids[-len(ids) // 20 :]


def batches(ids, count, seed, size=BATCH):
    """Yields `count` random windows of the text, int64 [size, LENGTH]; equal seeds give equal windows."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(ids) - LENGTH, (size, 1), generator=generator)
        yield ids[starts + torch.arange(LENGTH)]


def train(model, ids, steps, seed, lr, optimizer=bnb.optim.AdamW8bit):
    """Train what requires gradients. Returns the loss of each step."""
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for batch in batches(ids, steps, seed):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def evaluate(model, ids, seed=99):
    """The loss of one large batch."""
    (batch,) = batches(ids, 1, seed, size=32)
    with torch.no_grad():
        return model(batch, labels=batch).loss.item()


def make_base(folder, ids, steps, seed=0):
    """Make a Llama of 1.4 million parameters, train it in float for `steps` steps, save it to a folder."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    train(model, ids, steps, seed, lr=1e-3, optimizer=bnb.optim.AdamW)
    model.save_pretrained(folder)


def load_4bit(folder):
    """The saved model, its linear layers in NF4 with quantised scales."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


def add_adapters(model, seed=1):
    """Freeze the model and put an adapter beside each of its linear layers. Returns the PEFT model."""
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def bytes_per_parameter(model):
    """Bytes of the frozen 4-bit layers over the number of their parameters: codes, scales, and shared tables once."""
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    tensors = [value for layer in layers for value in (layer.weight.data, *_statistics(layer.weight.quant_state))]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) / sum(layer.in_features * layer.out_features for layer in layers)


def _statistics(state):
    own = [state.absmax, state.code]
    return own if not state.nested else [*own, state.offset, *_statistics(state.state2)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of the adapters")
    parser.add_argument("--base-steps", type=int, default=60, help="of the float model before that")
    parser.add_argument("--output", type=Path, help="where to save the adapters")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, folder)


def run(arguments, folder):
    """The whole way. folder: where the base model is saved."""
    training, held_out = text()
    make_base(folder, training, arguments.base_steps)
    model = add_adapters(load_4bit(folder))
    print(f"frozen: {bytes_per_parameter(model):.4f} bytes per parameter")
    print(f"held out: loss {evaluate(model, held_out):.3f}")
    losses = train(model, training, arguments.steps, seed=2, lr=2e-3)
    for first in range(0, len(losses), 10):
        part = losses[first : first + 10]
        print(f"step {first:5}: loss {sum(part) / len(part):.3f}")
    print(f"held out: loss {evaluate(model, held_out):.3f}")
    if arguments.output:
        model.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
