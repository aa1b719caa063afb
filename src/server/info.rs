//! Routes that describe the server: its models, whether it lives and answers, its version, its metrics, and a page to talk to it.

use super::{
    error::{ApiError, ErrorReply},
    metrics,
    state::Server,
    worker::Phase,
};
use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderValue, header},
    response::{Html, IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

/// The models.
#[derive(Serialize, ToSchema)]
pub(super) struct Models {
    /// `list`
    object: &'static str,
    data: Vec<Model>,
}

/// A model under one of its names.
#[derive(Serialize, ToSchema)]
pub(super) struct Model {
    id: String,
    /// `model`
    object: &'static str,
    /// Since when it is served, seconds since 1970.
    created: u64,
    /// `aoji`
    owned_by: &'static str,
    /// Most tokens of prompt and answer together.
    max_model_len: usize,
    /// Its first name.
    root: String,
}

impl Server {
    fn model(&self, name: &str) -> Model {
        Model {
            id: name.into(),
            object: "model",
            created: self.0.created,
            owned_by: "aoji",
            max_model_len: self.0.engine.max_context(),
            root: self.0.options.names[0].clone(),
        }
    }
}

/// The names of the model.
#[utoipa::path(get, path = "/v1/models", tag = "openai", security((), ("key" = [])), responses((status = 200, description = "All names", body = Models)))]
pub(super) async fn models(State(server): State<Server>) -> Json<Models> {
    let data = server.0.options.names.iter().map(|name| server.model(name)).collect();
    Json(Models { object: "list", data })
}

/// One name of the model. A name may contain slashes.
#[utoipa::path(
    get, path = "/v1/models/{*id}", tag = "openai", security((), ("key" = [])), params(("id" = String, Path, description = "A name")),
    responses((status = 200, description = "The model", body = Model), (status = 404, description = "No such name", body = ErrorReply))
)]
pub(super) async fn model(
    State(server): State<Server>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(id) = id.map_err(|e| ApiError::invalid("id", e.to_string()))?;
    let name = server.0.model(Some(&id))?;
    Ok(Json(server.model(&name)))
}

/// The state of the server.
#[derive(Serialize, ToSchema)]
pub(super) struct Status {
    /// `ok`, or `starting`, `draining`, `failed`.
    status: &'static str,
}

/// Whether the server lives.
#[utoipa::path(get, path = "/health", tag = "state", responses((status = 200, description = "It does", body = Status)))]
pub(super) async fn health() -> Json<Status> {
    Json(Status { status: "ok" })
}

/// Whether it answers: the model is loaded and has generated a token.
#[utoipa::path(
    get, path = "/ready", tag = "state",
    responses(
        (status = 200, description = "It does", body = Status),
        (status = 503, description = "Not yet, or not any more", body = ErrorReply),
    )
)]
pub(super) async fn ready(State(server): State<Server>) -> Result<Json<Status>, ApiError> {
    match server.phase() {
        Phase::Ready => Ok(Json(Status { status: "ok" })),
        Phase::Starting => Err(ApiError::unavailable("the model has not generated a token yet")),
        Phase::Draining => Err(ApiError::unavailable("the server is shutting down")),
        Phase::Failed(why) => Err(ApiError::unavailable(format!("the engine has stopped: {why}"))),
    }
}

/// The version.
#[derive(Serialize, ToSchema)]
pub(super) struct Version {
    /// Of aoji.
    version: &'static str,
}

/// The version of aoji.
#[utoipa::path(get, path = "/version", tag = "state", responses((status = 200, description = "The version", body = Version)))]
pub(super) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// Numbers for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "state",
    responses((status = 200, description = "In Prometheus' text format", body = String, content_type = "text/plain"))
)]
pub(super) async fn metrics(State(server): State<Server>) -> Result<Response, ApiError> {
    let text = server.0.metrics.text(server.0.worker.admitted()).map_err(|e| ApiError::internal(e.to_string()))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

/// A page to talk to the model.
#[utoipa::path(get, path = "/", tag = "state", responses((status = 200, description = "The page", body = String, content_type = "text/html")))]
pub(super) async fn page() -> Response {
    // The page is all of its own: whatever a model writes into it, nothing is loaded from elsewhere.
    const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                          img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let policy = [(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY))];
    (policy, Html(include_str!("../../assets/server/index.html"))).into_response()
}
