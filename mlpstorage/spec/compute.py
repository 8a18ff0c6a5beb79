"""Which model is played, and what computes it: the first part of the spec."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, ValidationInfo, field_validator, model_validator

from mlpstorage.config import KVCACHE_MODELS, Accelerator, GenerationMode, PerformanceProfile
from mlpstorage.errors import ConfigurationError
from mlpstorage.models import MODELS, ModelShape
from mlpstorage.spec.fields import Option, Spec
from mlpstorage.spec.model_config import read_model_config

BOTH = ("run", "datasize")
"""Commands that take what decides the sizes."""

WORKLOAD = "Workload"
COMPUTE = "Compute model and targets"

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


class ComputeSpec(Spec):
    """What is computed, by what, and how fast it should be. None stands for a value that is worked out."""

    model_config_file: Annotated[
        Path | None,
        Field(description="a model of one's own: its Hugging Face config.json, in the place of --model"),
        Option(flags=("--model-config",), group=WORKLOAD, metavar="FILE", commands=BOTH),
    ] = None
    model: Annotated[
        str,
        Field(description="model whose KV cache is played"),
        Option(flags=("--model", "-m"), group=WORKLOAD, metavar="NAME", commands=BOTH, choices=KVCACHE_MODELS),
    ] = "llama3.1-8b"

    accelerator: Annotated[
        Accelerator,
        Field(description="what computes, by formula; none: the rates below, or nothing"),
        Option(flags=("--accelerator",), group=COMPUTE, commands=BOTH),
    ] = Accelerator.H100
    num_accelerators: Annotated[
        int,
        Field(ge=1, le=100_000, description="accelerators that serve the users of a rank together (tensor parallel)"),
        Option(flags=("--num-accelerators",), group=COMPUTE, metavar="N", commands=BOTH),
    ] = 1
    mfu: Annotated[
        float,
        Field(gt=0, le=1, description="part of the accelerators' peak that prefill reaches"),
        Option(flags=("--mfu",), group=COMPUTE, metavar="X", commands=BOTH),
    ] = 0.5
    prefill_tokens_per_s: Annotated[
        float | None,
        Field(gt=0, description="prompt tokens that one's own engine computes a second, in the place of a formula"),
        Option(
            flags=("--prefill-tokens-per-s",),
            group=COMPUTE,
            metavar="N",
            commands=BOTH,
            default_text="by --accelerator",
        ),
    ] = None
    decode_tokens_per_s: Annotated[
        float | None,
        Field(gt=0, description="output tokens that it generates a second, for each request"),
        Option(flags=("--decode-tokens-per-s",), group=COMPUTE, metavar="N", default_text="by --accelerator"),
    ] = None
    generation_mode: Annotated[
        GenerationMode,
        Field(
            description="none: no compute and no think time; fast: a tenth of the modelled times; "
            "realistic: the modelled times"
        ),
        Option(flags=("--generation-mode",), group=COMPUTE),
    ] = GenerationMode.REALISTIC
    performance_profile: Annotated[
        PerformanceProfile,
        Field(description="targets of the verdict: TTFT p95 of 450 ms (latency) or 2,000 ms (throughput)"),
        Option(flags=("--performance-profile",), group=COMPUTE),
    ] = PerformanceProfile.LATENCY
    fail_on_slo: Annotated[
        bool,
        Field(
            description="end with exit code 1 where the target was missed, or too few requests were answered to tell"
        ),
        Option(flags=("--fail-on-slo",), group=COMPUTE, rank=False),
    ] = False

    _own_shape: ModelShape | None = PrivateAttr(default=None)

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return self._own_shape or MODELS[self.model]

    @property
    def ttft_p95_ms_target(self) -> float:
        """Target of the verdict: MLPerf Inference's TTFT limits for Llama 2 70B, interactive and server scenario."""
        return {PerformanceProfile.LATENCY: 450.0, PerformanceProfile.THROUGHPUT: 2000.0}[self.performance_profile]

    @model_validator(mode="wrap")
    @classmethod
    def _model_of_a_file(cls, values: Any, handler: ModelWrapValidatorHandler["ComputeSpec"]) -> "ComputeSpec":  # noqa: ANN401 - pydantic's own
        """Read the model's configuration once: the spec has its name and keeps its shape."""
        path = values.get("model_config_file") if isinstance(values, Mapping) else None
        if not isinstance(path, (str, Path)):
            return handler(values)
        if values.get("model") is not None:
            raise ValueError(f"--model-config {path} and --model {values['model']}: give one of the two")
        shape = read_model_config(Path(path))
        if not shape.layers:
            raise ConfigurationError(
                f"{path}: sliding_window: every layer has one, so that a sequence keeps {shape.window_tokens:,} tokens "
                "and nothing grows with it; only layers that keep every token are played: with sliding_window null "
                "all of them do"
            )
        spec = handler({**values, "model": shape.name})
        spec._own_shape = shape  # noqa: SLF001 - its own
        return spec

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str, info: ValidationInfo) -> str:
        if value not in MODELS and info.data.get("model_config_file") is None:
            raise ValueError(f"must be one of {', '.join(KVCACHE_MODELS)}; --model-config takes others")
        return value

    @model_validator(mode="before")
    @classmethod
    def _rates_are_instead_of_an_accelerator(cls, values: object) -> object:
        if not isinstance(values, Mapping) or all(values.get(name) is None for name in RATES):
            return values
        return {"accelerator": Accelerator.NONE} | dict(values)

    @model_validator(mode="after")
    def _formula_or_rates(self) -> "ComputeSpec":
        if self.accelerator is Accelerator.NONE:
            if self.num_accelerators != 1:
                raise ValueError(f"--num-accelerators {self.num_accelerators}: rates are of all of them together")
            if self.mfu != type(self).model_fields["mfu"].default:
                raise ValueError(f"--mfu {self.mfu:g}: is of an --accelerator, and there is none")
            return self
        for name in RATES:
            if (rate := getattr(self, name)) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} {rate:g}: takes the place of a formula: leave --accelerator "
                    f"{self.accelerator} out, or give --accelerator none"
                )
        return self
