"""The requests and responses of /api/v1/config."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.times import UtcTime
from jobs.states import State
from pipelines.media.audit.change_settings import MAX_RECOMMENDATIONS, ItemResult
from pipelines.media.audit.rules import Category, Priority

Id = Annotated[int, Field(ge=1, le=2**63 - 1)]


class AuditRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    services: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field(
        max_length=100, description="Types or names of services.", examples=[["sabnzbd", "sonarr"]]
    )
    include_web_search: bool = Field(
        default=True, description="Whether to search the web for pages about the findings."
    )


class CountsByPriority(BaseModel):
    critical: int
    high: int
    medium: int
    low: int


class ServiceFindings(BaseModel):
    issues_found: int
    recommendations: int


class WebSearch(BaseModel):
    used: bool
    reason: str | None = Field(description="Why it was not used, or was incomplete.")
    searches: int


class AuditView(BaseModel):
    """An audit. Fields are null until it has finished, and stay null if it fails."""

    audit_id: str = Field(examples=["audit_20261121_083000_k3x9"])
    status: State
    job_id: str
    timestamp: UtcTime
    services_audited: list[str]
    failed_services: dict[str, str] = Field(description="Services that could not be audited, and why.")
    total_recommendations: int | None
    recommendations_by_priority: CountsByPriority | None
    summary: dict[str, ServiceFindings]
    rule_problems: list[str] = Field(
        description="Errors in files of rules, as FILE:LINE: reason. Only administrators see the folder of the file."
    )
    web_search: WebSearch | None
    error: str | None


class PageInfo(BaseModel):
    page: int
    page_size: int
    total_items: int
    total_pages: int


class RecommendationView(BaseModel):
    id: int
    service: str
    category: Category
    setting_name: str
    current_value: Any = Field(
        description="The value at the last audit. Null for those who are no administrators, if it concerns security."
    )
    recommended_value: Any
    priority: Priority
    rationale: str
    impact: str
    applied: bool
    created_at: UtcTime
    area: str = Field(description="The section of the service's settings.")
    item: str | None = Field(description="The item in that area, if it is a list.")
    by_hand: str | None = Field(description="What to do by hand. Null: it can be applied.")


class RecommendationDetail(RecommendationView):
    explanation: str
    references: list[str]
    sources: list[str] = Field(description="Pages from the web search.")
    rule_id: str
    last_seen_at: UtcTime = Field(description="When an audit last found it.")
    closed_at: UtcTime | None = Field(description="When it was applied, or an audit no longer found it.")
    applied_at: UtcTime | None
    applied_by: str | None


class RecommendationPage(BaseModel):
    recommendations: list[RecommendationView]
    pagination: PageInfo
    filters_applied: dict[str, str | bool]


class ApplyRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    recommendation_ids: list[Id] = Field(max_length=MAX_RECOMMENDATIONS, examples=[[1, 2, 3]])
    dry_run: bool = Field(default=False, description="Show the changes without making them.")


class ChangeSummary(BaseModel):
    total: int
    successful: int
    failed: int


class ChangesView(BaseModel):
    """The result for each recommendation. With status 202 there is none yet: follow the job."""

    results: list[ItemResult]
    summary: ChangeSummary
    dry_run: bool
    job_id: str
    status: State


class PastAudit(BaseModel):
    audit_id: str
    timestamp: UtcTime
    services: list[str]
    total_recommendations: int
    critical_count: int
    high_count: int
    medium_count: int
    low_count: int
    applied_count: int = Field(description="Number of recommendations that are applied now.")
    failed_services: dict[str, str]


class AuditHistory(BaseModel):
    audits: list[PastAudit]
    pagination: PageInfo


class RuleView(BaseModel):
    id: str
    service: str
    area: str
    setting: str
    category: Category
    priority: Priority
    rationale: str
    by_hand: bool


class RulesView(BaseModel):
    rules: list[RuleView]
    problems: list[str] = Field(
        description="Errors in files of rules, as FILE:LINE: reason. Only administrators see the folder of the file."
    )
