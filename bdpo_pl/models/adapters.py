"""LoRA: small trainable matrices added to the policy's frozen weights; the model without them is the reference.

peft inserts the matrices into the linear layers of the model. The model keeps its class, so everything that works on a
model also works on one with adapters.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from bdpo_pl.errors import InputError
from bdpo_pl.models.adapter_folder import adapter_digest, read_config
from bdpo_pl.models.adapter_start import FROM_WEIGHT, START, Start, keep_starts
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.reach import unreached
from bdpo_pl.models.saved_modules import check_tied, saved_parameters
from bdpo_pl.models.tied import parameters_with_names

Quantization = Literal["none", "nf4"]

_ADAPTER = re.compile(r"\.lora_(A|B|magnitude_vector|embedding_A|embedding_B)\.")


@dataclass
class LoraOptions:
    """Low-rank adapters (arXiv:2106.09685), and QLoRA (arXiv:2305.14314) with `quantize: nf4`.

    Args:
        r: rank of the adapters. Default: 16.
        alpha: scale of the adapters' output, which is multiplied by alpha / r (alpha / √r with `rslora`). Default:
            twice the rank.
        dropout: dropout rate of an adapter's input. Leave it at 0: the reference has no dropout, so the noise would
            affect only one side of the loss's comparison.
        target_modules: names of the layers that get an adapter. Default: `all-linear`, every linear layer but the LM
            head; none if `target_parameters` are given.
        rslora: scale the adapters by the rank-stabilised factor, alpha / √r (arXiv:2312.03732).
        quantize: quantisation of the frozen weights: `none`, or `nf4` (4 bits, by bitsandbytes on a CUDA GPU). The
            reference is quantised in the same way; the exported model is not quantised.
        adapter: folder of a LoRA adapter that training starts from, for example one from supervised fine-tuning. The
            reference is the model with that adapter. Rank, alpha and modules are those of the adapter.
        dora: train the norm of each row (of an embedding: of each column) of a weight separately from its direction
            (DoRA, arXiv:2402.09353).
        init: initial values of the adapters. `zero`: no effect. `pissa` (arXiv:2404.02948; `pissa_niter_16` by a fast
            approximate decomposition) and `olora` (arXiv:2406.01775): the principal part of each weight.
        lr_ratio: learning rate of the B matrices, divided by that of all others (LoRA+, arXiv:2402.12354); 1: equal.
        modules_to_save: names of modules that are trained whole in addition to the adapters, for example
            `[embed_tokens, lm_head]`.
        target_parameters: names of parameters without a module of their own that get an adapter, for example the fused
            experts of a mixture: `[mlp.experts.gate_up_proj, mlp.experts.down_proj]`.

    Raises:
        InputError: a value is out of range, or options contradict each other.
    """

    r: int | None = None
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: str | list[str] | None = None
    rslora: bool = False
    quantize: Quantization = "none"
    adapter: str | None = None
    dora: bool = False
    init: str = "zero"
    lr_ratio: float = 1.0
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        self._config: dict[str, Any] | None = None
        if self.adapter is not None:
            self._refuse_beside_adapter()
            self._config = read_config(self.adapter)
        else:
            self.r = 16 if self.r is None else self.r
            self.alpha = 2 * self.r if self.alpha is None else self.alpha
            if self.target_modules is None and not self.target_parameters:
                self.target_modules = "all-linear"
        if self.r is not None and self.r < 1:
            raise InputError(f"model.lora.r must be at least 1, got {self.r}")
        if self.alpha is not None and self.alpha <= 0:
            raise InputError(f"model.lora.alpha must be above 0, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.lora.dropout must be in [0, 1), got {self.dropout}")
        if self.quantize not in ("none", "nf4"):
            raise InputError(f"model.lora.quantize must be none or nf4, got {self.quantize!r}")
        if self.lr_ratio <= 0.0:
            raise InputError(f"model.lora.lr_ratio must be above 0, got {self.lr_ratio}")
        self._check_init()

    def _refuse_beside_adapter(self) -> None:
        own = {"r": None, "alpha": None, "target_modules": None, "rslora": False, "dora": False, "init": "zero",
               "modules_to_save": None, "target_parameters": None}  # fmt: skip
        if given := [name for name, default in own.items() if getattr(self, name) != default]:
            raise InputError(
                f"model.lora.adapter brings its own {', '.join(given)}: leave out model.lora.{given[0]}, or merge the "
                "adapter into its base model and train new ones on that"
            )

    def _check_init(self) -> None:
        if self.init == "zero":
            return
        if not FROM_WEIGHT.fullmatch(self.init):
            raise InputError(
                f"model.lora.init must be zero, pissa, pissa_niter_N with a number N, or olora; got {self.init!r}"
            )
        for name, conflict in (
            ("dora", self.dora), ("quantize nf4", self.quantize == "nf4"),
            ("target_parameters", bool(self.target_parameters)),
        ):  # fmt: skip
            if conflict:
                raise InputError(
                    f"model.lora.init {self.init} does not go with model.lora.{name}: leave out one of them"
                )

    @property
    def described(self) -> str:
        """Short description of what is trained, for messages."""
        if self.adapter is not None:
            assert self._config is not None
            return f"LoRA of rank {self._config['r']}, alpha {self._config['lora_alpha']}, from an adapter"
        kinds = [name for name, on in (("DoRA", self.dora), (self.init, self.init != "zero")) if on]
        more = "".join(f", {kind}" for kind in kinds)
        if self.modules_to_save:
            more += f", and {', '.join(self.modules_to_save)} whole"
        return f"LoRA of rank {self.r}, alpha {self.alpha}{more}"

    @property
    def saved_modules(self) -> list[str]:
        """Names of the modules that are trained whole."""
        found = self.modules_to_save if self._config is None else self._config.get("modules_to_save")
        return list(found or ())

    @property
    def keeps_tied(self) -> bool:
        """True if the adapter's configuration keeps the shared weight of embedding and LM head shared."""
        return self._config is not None and bool(self._config.get("ensure_weight_tying"))

    def digest(self) -> str | None:
        """Return a digest of the adapter's files; None if training starts from no adapter."""
        return None if self.adapter is None else adapter_digest(self.adapter)

    def to_saved(self) -> dict[str, Any]:
        """Return the options as a checkpoint holds them; `from_saved` restores them."""
        return {"lora": asdict(self), "adapter_config": self._config}

    @classmethod
    def from_saved(cls, lora: dict[str, Any], adapter_config: dict[str, Any] | None = None) -> LoraOptions:
        """Restore the options from a checkpoint. The folder of an adapter need not exist any more."""
        options = cls(**{**lora, "adapter": None})
        if adapter_config is not None:
            vars(options).update(lora)
            options._config = adapter_config
        return options

    def config(self, model: CausalLM, **changes: object) -> Any:
        """Return peft's configuration of the adapters for `model`."""
        peft = peft_package()
        if self._config is not None:
            of_the_file = {"auto_mapping", "peft_version", "peft_type"}
            fields = set(peft.LoraConfig.__dataclass_fields__) - of_the_file
            unknown = [name for name, value in self._config.items() if value and name not in fields | of_the_file]
            if unknown:
                raise InputError(
                    f"{self.adapter}: its configuration has {', '.join(unknown)}, which the installed peft does not "
                    "know; install the version that wrote it"
                )
            given = {**self._config, "init_lora_weights": True, "inference_mode": False, "modules_to_save": None}
            given |= {"lora_dropout": self.dropout, "ensure_weight_tying": False, **changes}
            return peft.LoraConfig(**{name: value for name, value in given.items() if name in fields})
        # Adapters of layers that text never reaches would get no gradient.
        excluded = sorted({name.rpartition(".")[0] for name in unreached(model)})
        given = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.target_modules,
            "exclude_modules": excluded or None,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "task_type": "CAUSAL_LM",
        }
        if self.target_parameters:
            given["target_parameters"] = self.target_parameters
        return peft.LoraConfig(**{**given, **changes})


def quantization_config(options: LoraOptions | None) -> Any:
    """Return transformers' configuration for quantising the frozen weights; None without quantisation.

    Raises:
        InputError: there is no CUDA GPU, or bitsandbytes is not installed.
    """
    if options is None or options.quantize == "none":
        return None
    for missing, remedy in (
        (not torch.cuda.is_available(), "this process sees no CUDA GPU; set model.lora.quantize to none"),
        (
            importlib.util.find_spec("bitsandbytes") is None,
            'bitsandbytes is not installed; pip install "bdpo-pl[qlora]", or set model.lora.quantize to none',
        ),
    ):
        if missing:
            raise InputError(f"model.lora.quantize is {options.quantize}, but {remedy}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def add_adapters(model: CausalLM, options: LoraOptions) -> CausalLM:
    """Add adapters to `model`, in place, unless it has some already, and freeze all weights that are not trained.

    Raises:
        InputError: peft is not installed, or the adapters do not fit the model.
    """
    if options.dropout:
        rank_zero_warn(
            f"model.lora.dropout is {options.dropout}: the policy learns with noise that its reference does not have"
        )
    new = not any(is_adapter(name) for name, _ in model.named_parameters())
    if new:
        attach_adapters(model, options)
    dead = set() if new else unreached(model)
    whole = saved_parameters(model, options.saved_modules)
    for name, parameter in model.named_parameters():
        trained = (is_adapter(name) and not name.endswith(START)) or name in whole
        parameter.requires_grad_(trained and name not in dead)
    return model


def attach_adapters(model: CausalLM, options: LoraOptions) -> None:
    """Add adapters to `model`, in place, with their initial values.

    On the meta device there are no values; `Start.value` computes them later.

    Raises:
        InputError: peft is not installed, or the adapters do not fit the model.
    """
    try:
        peft_package().inject_adapter_in_model(options.config(model), model)
    except ValueError as error:
        # peft's message names the layers or parameters that the model lacks.
        where = "adapter" if options.adapter else "target_modules"
        value = options.adapter or options.target_modules
        raise InputError(f"model.lora.{where} {value!r}: {error}") from error
    if options.init != "zero":
        keep_starts(model)
    start = Start(options.init, options.adapter)
    quantised = any(not p.is_floating_point() for p in model.parameters())
    whole = saved_parameters(model, options.saved_modules)
    if start.folder is not None:
        check_tied(model, whole, start.folder, options.keeps_tied)
    with torch.no_grad():
        for names, parameter in parameters_with_names(model).values():
            name = names[0]
            if is_adapter(name):
                # In half precision, updates would be lost; adapters are small enough for float32.
                parameter.data = parameter.data.float()
            if parameter.is_meta:
                continue
            # peft computes the magnitudes of quantised weights itself.
            by_peft = quantised and start.folder is None and ".lora_magnitude_vector." in name
            if is_adapter(name) and not by_peft:
                parameter.copy_(start.value(model, name, parameter.shape, model.get_parameter))
            elif start.folder is not None and name in whole:
                # A tied weight may be stored under any of its names.
                held = next((one for one in names if one in start.folder), name)
                parameter.copy_(start.folder.read(held, tuple(parameter.shape)))
    if start.folder is not None and not any(p.is_meta for p in model.parameters()):
        for name in whole:
            if name in start.folder:
                start.folder.read(name, tuple(model.get_parameter(name).shape))
        start.folder.check_all_read()


def is_adapter(name: str) -> bool:
    """Return true if the parameter called `name` belongs to an adapter."""
    return _ADAPTER.search(name) is not None


def base_name(name: str) -> str:
    """Return the name that the parameter `name` has in the model without adapters."""
    return name.replace(".base_layer", "")


def peft_package() -> Any:
    """Import peft.

    Raises:
        InputError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError('model.lora needs the package peft; pip install "bdpo-pl[lora]"') from None
    return peft
