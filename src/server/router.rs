//! The routes, and what is around all of them: log, CORS, panics, keys, sizes.

use super::{
    anthropic, chat, completions, embeddings, error::ApiError, info, log, options::cors, responses, state::Server,
    tokens, worker::panic_text,
};
use axum::{
    Json, Router,
    body::{Bytes, HttpBody},
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderMap, HeaderValue, Method, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::{
    Modify, OpenApi,
    openapi::security::{Http, HttpAuthScheme, SecurityScheme},
};
use utoipa_axum::{router::OpenApiRouter, routes};

#[derive(OpenApi)]
#[openapi(
    info(title = "aoji", description = "OpenAI's APIs and Anthropic's for one model; docs/server.md says what happens to each field."),
    modifiers(&Keys)
)]
struct Description;

struct Keys;

impl Modify for Keys {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        openapi.components.get_or_insert_default().add_security_scheme("key", scheme);
    }
}

/// The routes that need a key, and those that do not.
fn routes() -> (OpenApiRouter<Server>, OpenApiRouter<Server>) {
    let keyed = OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(completions::create))
        .routes(routes!(chat::create))
        .routes(routes!(responses::create))
        .routes(routes!(embeddings::create))
        .routes(routes!(anthropic::create))
        .routes(routes!(anthropic::count_tokens))
        .routes(routes!(info::models))
        .routes(routes!(info::model))
        .routes(routes!(tokens::tokenize))
        .routes(routes!(tokens::detokenize))
        .routes(routes!(tokens::tokenizer_info));
    let open = OpenApiRouter::new()
        .routes(routes!(info::page))
        .routes(routes!(info::page_file))
        .routes(routes!(info::health))
        .routes(routes!(info::ready))
        .routes(routes!(info::version))
        .routes(routes!(info::metrics))
        .routes(routes!(openapi));
    (keyed, open)
}

/// The description of all routes and their fields.
fn description() -> utoipa::openapi::OpenApi {
    let (keyed, open) = routes();
    let mut openapi = keyed.merge(open).into_openapi();
    // axum and OpenAPI write a name that may contain slashes differently.
    if let Some(model) = openapi.paths.paths.remove("/v1/models/{*id}") {
        openapi.paths.paths.insert("/v1/models/{id}".into(), model);
    }
    openapi
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "state", responses((status = 200, description = "An OpenAPI 3.1 document", body = Object)))]
async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(description())
}

impl Server {
    /// All routes, as a service for an axum program.
    pub fn router(&self) -> Router {
        let (keyed, open) = routes();
        let keyed = keyed.layer(middleware::from_fn_with_state(self.clone(), key));
        let router: Router<Server> = keyed.merge(open).into();
        let options = &self.0.options;
        let router = router
            .fallback(|method: Method, uri: Uri| async move { ApiError::no_route(method.as_str(), &short(&uri)) })
            .method_not_allowed_fallback(|method: Method, uri: Uri| async move {
                ApiError::no_method(method.as_str(), &short(&uri))
            })
            .layer(DefaultBodyLimit::max(options.body_limit))
            .layer(CatchPanicLayer::custom(panicked))
            .layer(middleware::from_fn(anthropic::errors))
            .layer(middleware::from_fn(unread));
        let router = match cors(&options.cors) {
            Ok(Some(cors)) => router.layer(cors),
            _ => router, // `start` has refused origins that are none
        };
        let router = router.layer(middleware::from_fn_with_state(self.clone(), log::log)).with_state(self.clone());
        // This needs a router around the router: a router chooses the route before its layers run.
        Router::new().fallback_service(router).layer(middleware::map_request(plain_path))
    }
}

/// Corrects the path of a request: clients join a base URL and a route with a slash too many at either end.
async fn plain_path(mut request: Request) -> Request {
    let path = request.uri().path();
    if path.contains("//") || (path.ends_with('/') && path.len() > 1) {
        let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        let query = request.uri().query().map_or(String::new(), |query| format!("?{query}"));
        let mut parts = request.uri().clone().into_parts();
        parts.path_and_query = format!("/{}{query}", names.join("/")).parse().ok();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}

fn short(uri: &Uri) -> String {
    uri.path().chars().take(200).collect()
}

/// Stops requests that do not have a right key.
async fn key(State(server): State<Server>, request: Request, next: Next) -> Response {
    match which(&server.0.options.keys, request.headers()) {
        Some(key) => {
            if let Some(log) = request.extensions().get::<Arc<log::RequestLog>>() {
                log.set_key(key);
            }
            next.run(request).await
        }
        None => ApiError::no_key().into_response(),
    }
}

/// Which of `keys` a request has; 0 if there are no keys. All keys are compared, each in constant time.
fn which(keys: &[String], headers: &HeaderMap) -> Option<usize> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|sent| sent.as_bytes().split_at_checked(7));
    let bearer = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer ")).map(|(_, key)| key);
    // Clients of Anthropic's API send the second header.
    let sent = bearer.or_else(|| headers.get("x-api-key").map(HeaderValue::as_bytes)).unwrap_or_default();
    let none = u64::MAX;
    let found = keys
        .iter()
        .zip(0..)
        .fold(none, |found, (key, i): (_, u64)| u64::conditional_select(&found, &i, key.as_bytes().ct_eq(sent)));
    if keys.is_empty() { Some(0) } else { (found != none).then_some(found as usize) }
}

/// Closes the connection after a response to a body that was not read to its end, such as a request without a key. The
/// client must be told, or its next request on this connection fails.
async fn unread(request: Request, next: Next) -> Response {
    let read = Arc::new(AtomicBool::new(request.body().is_end_stream()));
    let end = read.clone();
    let request = request.map(|body| {
        let end = stream::once(async move {
            end.store(true, Ordering::Relaxed);
            Ok(Bytes::new())
        });
        axum::body::Body::from_stream(body.into_data_stream().chain(end))
    });
    let mut response = next.run(request).await;
    if !read.load(Ordering::Relaxed) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic_text(&*panic);
    tracing::error!("a request panicked: {text}");
    ApiError::internal(format!("a fault of aoji, please report it: {text}")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::StatusCode;

    #[test]
    fn a_panic_is_a_reply() {
        let response = panicked(Box::new("on purpose"));
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
    }
}
