"""The list of all routers, in the order of the API's documentation.

The order of routers has no effect: no path pattern of a router matches a path of another one. Inside a router a literal
path is declared before a pattern that matches it. tests/serve/test_routes.py verifies both.
"""

from fastapi import APIRouter

from serve.forge import routes as forge_routes
from serve.guardian import feedback, repositories, retrain, webhooks
from serve.jobs import events as jobs_events
from serve.jobs import routes as jobs_routes
from serve.jobs import schedules
from serve.media import audits, downloads, libraries, movies, recovery, shows
from serve.models import engine_routes
from serve.models import routes as models_routes
from serve.monitoring import health, metrics_route
from serve.ollama import blobs
from serve.ollama import embeddings as ollama_embeddings
from serve.ollama import generate as ollama_generate
from serve.ollama import manage as ollama_manage
from serve.ollama import models as ollama_models
from serve.openai import chat, completions, embeddings, query, rerank
from serve.openai import models as openai_models
from serve.openai.batches import routes as batches_routes
from serve.openai.files import routes as files_routes
from serve.openai.files import upload_routes
from serve.openai.fine_tuning import routes as fine_tuning_routes
from serve.openai.responses import routes as responses_routes
from serve.realtime import routes as realtime_routes
from serve.security import routes as security_routes
from serve.services import health as services_health
from serve.services import routes as services_routes
from serve.services import settings
from serve.services import tools as services_tools
from serve.training import datasets, prompts
from serve.training import sessions as training_sessions
from serve.training import workers as training_workers

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    metrics_route.router,
    services_health.router,
    services_routes.router,
    shows.router,
    movies.router,
    downloads.router,
    libraries.router,
    services_tools.router,
    recovery.router,
    audits.router,
    settings.router,
    security_routes.router,
    jobs_routes.router,
    jobs_events.router,
    schedules.router,
    feedback.router,
    prompts.router,
    datasets.router,
    repositories.router,
    webhooks.router,
    training_sessions.router,
    training_workers.router,
    forge_routes.router,
    models_routes.router,
    engine_routes.router,
    openai_models.router,
    chat.router,
    query.router,
    completions.router,
    responses_routes.router,
    batches_routes.router,
    embeddings.router,
    ollama_embeddings.router,
    rerank.router,
    files_routes.router,
    upload_routes.router,
    fine_tuning_routes.router,
    ollama_generate.router,
    ollama_models.router,
    blobs.router,
    ollama_manage.router,
    realtime_routes.router,
    forge_routes.openai_router,
    retrain.router,
)
