"""The list of all routers, in the order of the API's documentation, each with its tag and its error envelope.

What differs between the routes of a router is marked at the routes (serve/http/marks.py).

The order of routers has no effect: no path pattern of a router matches a path of another one. Inside a router a literal
path is declared before a pattern that matches it. tests/serve/test_routes.py verifies both.
"""

from serve.forge import routes as forge_routes
from serve.guardian import feedback, repositories, retrain, webhooks
from serve.http.mounts import Mount
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
from serve.security import audit_log, usage
from serve.security import routes as security_routes
from serve.servers import machine_routes
from serve.servers import routes as servers_routes
from serve.services import health as services_health
from serve.services import routes as services_routes
from serve.services import settings
from serve.services import tools as services_tools
from serve.training import datasets, prompts
from serve.training import sessions as training_sessions
from serve.training import workers as training_workers

MOUNTS = (
    Mount(health.router, "Monitoring"),
    Mount(metrics_route.router, "Monitoring"),
    Mount(services_health.router, "Monitoring"),
    Mount(servers_routes.router, "Servers"),
    Mount(machine_routes.ai_server, "Servers"),
    Mount(machine_routes.app_server, "Servers"),
    Mount(machine_routes.storage_server, "Servers"),
    Mount(services_routes.router, "Services"),
    Mount(shows.router, "Shows"),
    Mount(movies.router, "Movies"),
    Mount(downloads.router, "Downloads"),
    Mount(libraries.router, "Media"),
    Mount(services_tools.router, "Service tools"),
    Mount(recovery.router, "Recovery"),
    Mount(audits.router, "Configuration"),
    Mount(settings.router, "Settings"),
    Mount(security_routes.router, "Auth"),
    Mount(usage.router, "Auth"),
    Mount(audit_log.router, "Auth"),
    Mount(jobs_routes.router, "Jobs"),
    Mount(jobs_events.router, "Jobs"),
    Mount(schedules.router, "Schedules"),
    Mount(feedback.router, "Feedback"),
    Mount(prompts.router, "Training"),
    Mount(datasets.router, "Training"),
    Mount(repositories.router, "Guardian"),
    Mount(webhooks.router, "Guardian"),
    Mount(training_sessions.router, "Training"),
    Mount(training_workers.router, "Training"),
    Mount(forge_routes.router, "Forge"),
    Mount(models_routes.router, "Models"),
    Mount(engine_routes.router, "Models"),
    Mount(openai_models.router, "Models", "openai"),
    Mount(openai_models.summary_router, "Models"),
    Mount(chat.router, "Chat", "openai"),
    Mount(query.router, "Chat", "openai"),
    Mount(completions.router, "Chat", "openai"),
    Mount(responses_routes.router, "Responses", "openai"),
    Mount(batches_routes.router, "Batches", "openai"),
    Mount(embeddings.router, "Chat", "openai"),
    Mount(ollama_embeddings.router, "Ollama", "ollama"),
    Mount(rerank.router, "Chat", "openai"),
    Mount(files_routes.router, "Files", "openai"),
    Mount(upload_routes.router, "Files", "openai"),
    Mount(fine_tuning_routes.router, "Fine-tuning", "openai"),
    Mount(ollama_generate.router, "Ollama", "ollama"),
    Mount(ollama_models.router, "Ollama", "ollama"),
    Mount(blobs.router, "Ollama", "ollama"),
    Mount(ollama_manage.router, "Ollama", "ollama"),
    Mount(realtime_routes.router, "WebSockets"),
    Mount(forge_routes.openai_router, "Forge", "openai"),
    Mount(retrain.router, "Guardian", "openai"),
)
