"""A model of a test in the registry of a real MLflow server."""

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster import mlflow_client
from cluster.db import now
from cluster.mlflow_client import MlflowRestClient
from cluster.ownership import LOCAL, Principal
from pipelines.training.models.registry import Registry
from pipelines.training.models.versions import ModelFile, Version


class RegistryModel:
    """A model with a name of its own, without versions at first."""

    def __init__(self, mlflow: MlflowRestClient, folder: Path) -> None:
        self.mlflow = mlflow
        self.registry = Registry(mlflow)
        self.folder = folder
        self.name = f"m-{uuid4().hex[:12]}"

    def file(self, content: bytes, quantization: str = "q8_0") -> tuple[ModelFile, Path]:
        path = self.folder / f"{self.name}.{quantization}.{uuid4().hex[:6]}.gguf"
        path.write_bytes(content)
        return ModelFile(path.name, quantization, hashlib.sha256(content).hexdigest(), len(content)), path

    async def run(self, export_job_id: str) -> str:
        experiment = await self.mlflow.find_or_create_experiment("export")
        return await self.mlflow.find_or_create_run(experiment, export_job_id, now(), {})

    async def register(
        self, *contents: bytes, export: str | None = None, principal: Principal = LOCAL, **options: Any
    ) -> Version:
        export = export or f"job_{uuid4().hex[:8]}"
        return await self.registry.register(
            self.name,
            await self.run(export),
            [self.file(content) for content in contents or (os.urandom(1000),)],
            base_model="forgearr/tiny",
            job_id="job_train",
            export_job_id=export,
            principal=principal,
            **options,
        )

    async def pass_validation(self, number: int, **metrics: float) -> None:
        """Record that a version has passed its validation with these metrics, or with good ones."""
        measured = {"samples": 20, "perplexity_ratio": 0.5, "gguf_top1_agreement": 0.99, "gguf_kl": 0.01, **metrics}
        await self.registry.set_validation(self.name, number, True, [], {"gates": {}, "metrics": measured})


def register_model(mlflow_url: str, folder: Path, *files: Path) -> str:
    """Register files as versions of a new model, which serves the first, and return its name."""

    async def register() -> str:
        async with mlflow_client.connect(mlflow_url) as mlflow:
            registry_model = RegistryModel(mlflow, folder)
            for file in files:
                await registry_model.register(file.read_bytes())
            await registry_model.registry.set_served(registry_model.name, 1)
            return registry_model.name

    return asyncio.run(register())
