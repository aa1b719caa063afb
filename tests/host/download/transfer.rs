//! How the bytes of a download arrive: whole, in parts, again, or not at all.

use super::{Answer, COMMIT, Files, Place, REPO, Request, Server, large, names, pull, range, sha256};
use aoji::{
    Error,
    hub::{Cache, Repo},
};
use std::{
    fs,
    net::TcpListener,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

#[test]
fn offline_is_what_the_hub_takes_for_true() {
    for (value, is_true) in
        [("1", true), ("true", true), ("ON", true), ("Yes", true), ("false", false), ("0", false), ("no", false)]
    {
        assert_eq!(pull::is_true(value), is_true, "{value}");
    }
}

#[test]
fn downloads_into_the_layout_of_the_hub() {
    let (place, server) = (Place { token: Some("secret".into()), ..Place::new() }, Files::one().serve());
    let snapshot = place.pull(&server).unwrap();
    assert_eq!(place.found(), Some(snapshot.clone()));
    assert!(snapshot.ends_with(format!("snapshots/{COMMIT}")));
    assert_eq!(names(&snapshot), ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(snapshot.join("tokenizer.json")).unwrap(), b"content of tokenizer.json");
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == large(1));
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(snapshot.join("model.safetensors")).unwrap(),
        Path::new("../../blobs").join(sha256(&large(1)))
    );
    assert_eq!(names(&place.root().join("blobs")).len(), 3);
    // The token goes to the hub, and not to the storage on another host.
    let authorized = |start| server.requests(start).iter().filter(|r| r.headers.contains_key("authorization")).count();
    assert_eq!(authorized("/owner/"), server.requests("/owner/").len());
    assert_eq!((server.requests("/storage/").len(), authorized("/storage/")), (1, 0));
}

#[test]
fn a_second_time_downloads_nothing() {
    let (place, server) = (Place::new(), Files::one().serve());
    let first = place.pull(&server).unwrap();
    let gets = || server.requests("/").iter().filter(|r| r.method == "GET" && !r.path.starts_with("/api")).count();
    let before = gets();
    assert_eq!(place.pull(&server).unwrap(), first);
    assert_eq!(gets(), before);
}

#[test]
fn resumes_what_an_earlier_run_left() {
    let (place, server) = (Place::new(), Files::one().serve());
    let path = place.incomplete(&large(1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, &large(1)[..1_000_000]).unwrap();
    let snapshot = place.pull(&server).unwrap();
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == large(1));
    let requests = server.requests("/storage/");
    assert_eq!(requests.iter().map(range).collect::<Vec<_>>(), [1_000_000]);
    assert!(!path.exists());
}

#[test]
fn a_complete_leftover_is_only_checked() {
    let (place, server) = (Place::new(), Files::one().serve());
    let path = place.incomplete(&large(1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, large(1)).unwrap();
    place.pull(&server).unwrap();
    assert_eq!(server.requests("/storage/").len(), 0);
}

#[test]
fn a_leftover_that_is_too_long_is_dropped() {
    let (place, server) = (Place::new(), Files::one().serve());
    let path = place.incomplete(&large(1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, vec![0; 3_000_001]).unwrap();
    assert!(fs::read(place.pull(&server).unwrap().join("model.safetensors")).unwrap() == large(1));
}

#[test]
fn goes_on_within_one_run_when_the_connection_breaks() {
    let server = Files::one()
        .serve_storage(|request, answer| Answer { cut: (range(request) < 2_000_000).then_some(700_000), ..answer });
    let place = Place::new();
    let snapshot = place.pull(&server).unwrap();
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == large(1));
    let from: Vec<usize> = server.requests("/storage/").iter().map(range).collect();
    assert_eq!(from, [0, 700_000, 1_400_000, 2_100_000]);
}

#[test]
fn gives_up_without_progress_and_resumes_later() {
    let place = Place::new();
    let broken = Files::one()
        .serve_storage(|request, answer| Answer { cut: Some(if range(request) == 0 { 500_000 } else { 0 }), ..answer });
    place.fails(&broken, &["interrupted", "same command"]);
    assert_eq!(broken.requests("/storage/").len(), 5);
    assert_eq!(fs::metadata(place.incomplete(&large(1))).unwrap().len(), 500_000);
    let server = Files::one().serve();
    place.pull(&server).unwrap();
    assert_eq!(server.requests("/storage/").iter().map(range).collect::<Vec<_>>(), [500_000]);
}

#[test]
fn starts_again_where_the_server_knows_no_ranges() {
    let place = Place::new();
    let path = place.incomplete(&large(1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, &large(9)[..1_000_000]).unwrap();
    let server = Files::one().serve_storage(|_, _| Answer::ok(large(1)));
    assert!(fs::read(place.pull(&server).unwrap().join("model.safetensors")).unwrap() == large(1));
}

#[test]
fn a_server_error_is_tried_again() {
    let asked = AtomicU32::new(0);
    let server = Files::one().serve_storage(move |_, answer| match asked.fetch_add(1, Ordering::Relaxed) {
        0 | 1 => Answer::status(503),
        _ => answer,
    });
    Place::new().pull(&server).unwrap();
    let server = Files::one().serve_storage(|_, _| Answer::status(503));
    Place::new().fails(&server, &["503", "later"]);
    assert_eq!(server.requests("/storage/").len(), 5);
}

#[test]
fn wrong_hash() {
    let place = Place::new();
    let server = Files::one().serve_storage(|_, answer| Answer { body: large(7), ..answer });
    place.fails(&server, &["sha256", &sha256(&large(7)), &sha256(&large(1)), "again"]);
    assert!(!place.incomplete(&large(1)).exists());
    assert!(!place.root().join("blobs").join(sha256(&large(1))).exists());
}

#[test]
fn wrong_size() {
    let server = Files::one().serve_storage(|_, _| Answer::ok(large(1)[..2_999_999].to_vec()));
    Place::new().fails(&server, &["interrupted"]);
    let longer = Files::one().serve_storage(|_, _| Answer::ok([large(1), vec![0]].concat()));
    Place::new().fails(&longer, &["3000001 of 3000000"]);
}

#[test]
fn refusals_say_what_to_do() {
    let refuse =
        |status, code: &'static str| Server::start(move |_, _| Answer::status(status).with("X-Error-Code", code));
    let without = Place::new();
    let with = Place { token: Some("secret".into()), ..Place::new() };
    without.fails(&refuse(401, "RepoNotFound"), &["401", "check the name", "HF_TOKEN"]);
    with.fails(&refuse(401, "RepoNotFound"), &["401", "token is not valid", "HF_TOKEN"]);
    without.fails(&refuse(401, "GatedRepo"), &["401", "gated", "/owner/model", "HF_TOKEN"]);
    with.fails(&refuse(403, "GatedRepo"), &["403", "gated", "accept its conditions at http", "/owner/model"]);
    with.fails(&refuse(403, ""), &["403", "no access"]);
    without.fails(&refuse(404, "RevisionNotFound"), &["404", "no revision \"main\""]);
    without.fails(&refuse(404, ""), &["404", "check the name"]);
    without.fails(&refuse(429, ""), &["429", "wait"]);
    without.fails(&refuse(500, ""), &["500", "later"]);
    without.fails(&refuse(418, ""), &["418", "HF_ENDPOINT"]);
    assert!(!format!("{:?}", with.pull(&refuse(401, "")).unwrap_err()).contains("secret"));
}

#[test]
fn refused_at_the_file() {
    let files = Files::one();
    let server = Server::start(move |request, port| match request.path.contains("/resolve/") {
        true => Answer::status(403).with("X-Error-Code", "GatedRepo"),
        false => files.answer(request, port),
    });
    Place::new().fails(&server, &["config.json", "403", "gated", "set HF_TOKEN"]);
}

#[test]
fn nobody_there() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port(); // closed again at once
    let server = Server { endpoint: format!("http://127.0.0.1:{port}"), log: Arc::default() };
    Place::new().fails(&server, &["cannot be reached", "network"]);
}

#[test]
fn not_a_hub() {
    Place::new().fails(&Server::start(|_, _| Answer::ok("<html>")), &["not a hub's"]);
    let bad_commit = Server::start(|_, _| Answer::ok(r#"{"sha": "../../x", "siblings": []}"#));
    Place::new().fails(&bad_commit, &["not a hub's", "../../x"]);
    let files = Files::one();
    let bad_etag = Server::start(move |request, port| match request.path.contains("/resolve/") {
        true => Answer::ok("x").with("ETag", "\"../../x\""),
        false => files.answer(request, port),
    });
    Place::new().fails(&bad_etag, &["../../x", "ETag"]);
}

#[test]
fn endless_redirects() {
    let files = Files::one();
    let server = Server::start(move |request, port| match request.path.contains("/resolve/") {
        true => Answer::status(307).with("Location", &request.path),
        false => files.answer(request, port),
    });
    Place::new().fails(&server, &["redirects without end"]);
}

#[test]
fn one_download_of_a_file_at_a_time() {
    let (place, server) = (Place::new(), Files::one().serve());
    let path = place.incomplete(&large(1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let other = fs::File::create(&path).unwrap();
    other.lock().unwrap();
    let error = place.pull(&server).unwrap_err();
    assert!(matches!(&error, Error::File { what, .. } if what.contains("another process")), "{error}");
    drop(other);
    place.pull(&server).unwrap();
}

/// Before the end of a download, nothing that opens models finds it, not even by its commit.
#[test]
fn half_a_model_is_not_found() {
    let place = Place::new();
    let server = Files::sharded().serve_storage(|request, answer| match request.path.ends_with("b.safetensors") {
        true => Answer::status(403),
        false => answer,
    });
    place.fails(&server, &["b.safetensors", "403"]);
    let repo = Repo::parse(REPO).unwrap();
    let cache = Cache::at(place.dir.path());
    assert_eq!((cache.revisions(&repo), cache.snapshot(&repo, COMMIT).unwrap()), (vec![], None));
    let blobs = names(&place.root().join("blobs"));
    assert_eq!(
        blobs.iter().filter(|name| !name.ends_with(".incomplete")).count(),
        4,
        "what arrived is kept: {blobs:?}"
    );
    place.pull(&Files::sharded().serve()).unwrap();
    assert_eq!(cache.revisions(&repo), ["main"]);
}

/// A proxy that wants a password, passes requests on and refuses CONNECT, which is enough for an http:// server.
#[test]
fn a_proxy_that_does_not_connect() {
    let files = Files::one();
    let server = files.clone();
    let proxy = Server::start(move |request, port| {
        let at = |path: &str| server.answer(&Request { path: path.to_string(), ..request.clone() }, port);
        match request.path.strip_prefix("http://hub.example") {
            Some(path) if request.headers["proxy-authorization"] == "Basic bWU6cEBzcw==" => at(path),
            Some(_) => Answer::status(407),
            None => request.path.find("/storage/").map_or(Answer::status(403), |i| at(&request.path[i..])),
        }
    });
    let (mut pull, dir) = (std::process::Command::new(env!("CARGO_BIN_EXE_aoji")), tempfile::tempdir().unwrap());
    for name in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "http_proxy", "NO_PROXY", "no_proxy"] {
        pull.env_remove(name);
    }
    pull.env("HTTP_PROXY", proxy.endpoint.replace("//", "//me:p%40ss@"));
    pull.env("HF_ENDPOINT", "http://hub.example").env("HF_HUB_CACHE", dir.path());
    let out = pull.args(["pull", REPO]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(proxy.requests("http://hub.example/").len() > 1 && proxy.requests("hub.example").is_empty());
    let cache = Cache::at(dir.path());
    assert!(cache.snapshot(&Repo::parse(REPO).unwrap(), COMMIT).unwrap().is_some());
}
