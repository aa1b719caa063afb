//! Routes that describe the server: its models, whether it is alive and ready, its version, its metrics, and a page to
//! talk to the model.

use super::{
    error::{ApiError, ErrorReply},
    metrics,
    state::Server,
    worker::Phase,
};
use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::header,
    response::{IntoResponse, Response},
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

/// Whether the process is alive.
#[utoipa::path(get, path = "/health", tag = "state", responses((status = 200, description = "It does", body = Status)))]
pub(super) async fn health() -> Json<Status> {
    Json(Status { status: "ok" })
}

/// Whether it is ready: the model is loaded and has generated a token.
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

/// What the page may do, whatever a model writes into it: run and load these files, and ask this server.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify";

/// A file of the page, as its folder has it.
macro_rules! file {
    ($path:literal) => {
        include_str!(concat!("../../assets/server/", $path))
    };
}

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// What the page loads: name, type, text.
const FILES: [(&str, &str, &str); 6] = [
    ("page.css", "text/css; charset=utf-8", file!("page.css")),
    ("page.js", SCRIPT, file!("page.js")),
    ("markdown.js", SCRIPT, file!("markdown.js")),
    ("store.js", SCRIPT, file!("store.js")),
    ("marked.umd.js", SCRIPT, file!("vendor/marked.umd.js")),
    ("purify.min.js", SCRIPT, file!("vendor/purify.min.js")),
];

fn shown(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CONTENT_TYPE, kind),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-cache"), // or a page of one version could meet scripts of another
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, text).into_response()
}

/// A page to talk to the model.
#[utoipa::path(get, path = "/", tag = "state", responses((status = 200, description = "The page", body = String, content_type = "text/html")))]
pub(super) async fn page() -> Response {
    shown("text/html; charset=utf-8", file!("index.html"))
}

/// A file that the page loads.
#[utoipa::path(
    get, path = "/page/{file}", tag = "state", params(("file" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The file", body = String, content_type = "text/javascript"),
        (status = 404, description = "No such file", body = ErrorReply),
    )
)]
pub(super) async fn page_file(name: Result<Path<String>, PathRejection>) -> Result<Response, ApiError> {
    let name = name.map_or(String::new(), |Path(name)| name);
    let file = FILES.iter().find(|(known, ..)| *known == name);
    let none = || ApiError::no_route("GET", &format!("/page/{}", name.chars().take(200).collect::<String>()));
    file.map(|(_, kind, text)| shown(kind, text)).ok_or_else(none)
}
