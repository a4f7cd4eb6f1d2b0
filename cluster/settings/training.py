"""Settings of training and of the gates for a model."""

from pathlib import Path

from pydantic import Field

from cluster.settings.base import Section


class GateSettings(Section):
    min_samples: int | None = Field(ge=1, description="Fewest held-out samples to measure on. Null: one is enough.")
    max_perplexity: float | None = Field(
        gt=1, description="Highest perplexity on held-out samples that passes validation. Null: no limit."
    )
    max_perplexity_ratio: float | None = Field(gt=0, description="Highest ratio of its perplexity to the base model's.")
    min_rouge_l: float | None = Field(ge=0, le=1, description="Lowest ROUGE-L of generated answers.")
    min_exact_match: float | None = Field(ge=0, le=1, description="Lowest share of answers that are exactly right.")
    min_top1_agreement: float | None = Field(
        ge=0, le=1, description="Lowest share of tokens on which the exported file agrees with the trained model."
    )
    max_kl: float | None = Field(ge=0, description="Highest mean divergence (KL, in nats) of the exported file.")


class ForgeSettings(Section):
    folders: list[Path] = Field(
        description="Folders on this machine whose data and base models anyone may use for training. Administrators "
        "may use any folder."
    )
    hub_token_repositories: list[str] = Field(
        description="Repositories of the Hugging Face hub, such as meta-llama/*, that users' jobs may download with "
        "HF_TOKEN. Administrators' jobs may use it for all."
    )
    converter: Path | None = Field(
        description="Folder of llama.cpp's converter (convert_hf_to_gguf.py). Null: downloaded once, from the source "
        "package of the installed llama-cpp-python."
    )
