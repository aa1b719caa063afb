//! Which files of which repository are fetched.

use super::{Answer, COMMIT, Files, Place, REPO, Request, Server, large, names};
use aoji::{
    Error,
    hub::{Cache, Repo},
};
use std::fs;

#[test]
fn revisions_are_kept_where_the_hub_keeps_them() {
    for (revision, encoded) in [("refs/pr/1", "refs%2Fpr%2F1"), ("v1.0", "v1.0"), (COMMIT, COMMIT)] {
        let files = Files::one();
        let server = Server::start(move |request, port| {
            let path = request.path.replace(&format!("/revision/{encoded}"), "/revision/main");
            files.answer(&Request { path, ..request.clone() }, port)
        });
        let place = Place::new();
        let snapshot = place.pull_revision(&server, REPO, revision).unwrap();
        let reference = place.root().join("refs").join(revision);
        assert_eq!(fs::read_to_string(reference).unwrap(), COMMIT, "{revision}");
        assert_eq!(server.requests(&format!("/api/models/{REPO}/revision/{encoded}")).len(), 1);
        let cache = Cache::at(place.dir.path());
        let repo = Repo::parse(REPO).unwrap();
        assert_eq!(cache.revisions(&repo), [revision]);
        assert_eq!(cache.snapshot(&repo, revision).unwrap(), Some(snapshot));
    }
    let server = Files::one().serve();
    for bad in ["", "../main", "a b", "a//b", "/a", "a?b", "refs/.."] {
        let error = Place::new().pull_revision(&server, REPO, bad).unwrap_err().to_string();
        assert!(error.contains("expected a branch, a tag, a commit"), "{bad}: {error}");
    }
}

#[test]
fn downloads_the_files_of_an_index() {
    let (place, server) = (Place::new(), Files::sharded().serve());
    let snapshot = place.pull(&server).unwrap();
    let expected = ["a.safetensors", "b.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json"];
    assert_eq!(names(&snapshot), expected);
    assert!(fs::read(snapshot.join("b.safetensors")).unwrap() == large(2));
}

#[test]
fn a_renamed_repository() {
    let files = Files::one();
    let server = Server::start(move |request, port| match request.path.replace("/old/name", "/owner/model") {
        path if path == request.path => files.answer(request, port),
        path => Answer::status(307).with("Location", path),
    });
    let place = Place::new();
    let snapshot = place.pull_repo(&server, "old/name").unwrap();
    assert!(snapshot.starts_with(place.dir.path().join("models--old--name")));
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == large(1));
}

#[test]
fn repositories_that_are_no_models() {
    let mut files = Files::one();
    files.small.remove("config.json");
    Place::new().fails(&files.clone().serve(), &["no config.json"]);
    files.large.clear();
    files.small.remove("model.gguf");
    Place::new()
        .fails(&files.serve(), &["neither model.safetensors nor", "pytorch_model.bin, which aoji does not read"]);
}

/// A repository of GGUF files alone, as converters publish them.
#[test]
fn gguf_files_by_their_names() {
    let mut files = Files::default();
    for name in ["m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "README.md"] {
        files.small.insert(name.into(), format!("content of {name}").into_bytes());
    }
    let server = files.clone().serve();
    Place::new().fails(&server, &["2 GGUF models", "--file", "m-Q4_K_M.gguf, m-Q8_0-00001-of-00002.gguf"]);
    let pull = |pattern: &str| {
        let place = Place { file: Some(pattern.into()), ..Place::new() };
        let snapshot = place.pull(&server).unwrap();
        names(&snapshot)
    };
    assert_eq!(pull("*Q4_K_M*"), ["m-Q4_K_M.gguf"]);
    assert_eq!(pull("m-Q8_0-*.gguf"), ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]);
    for pattern in ["*Q5*", "m-Q4_K_M", "Q4_K_M*", "*Q8*Q8*"] {
        let place = Place { file: Some(pattern.into()), ..Place::new() };
        place.fails(&server, &["no file of the repository is named", pattern, "m-Q4_K_M.gguf"]);
    }
    // the only model there is needs no name, nor a configuration
    files.small.remove("m-Q4_K_M.gguf");
    assert_eq!(names(&Place::new().pull(&files.serve()).unwrap()).len(), 2);
}

#[test]
fn an_index_that_leads_elsewhere() {
    for name in ["../../../x.safetensors", "/etc/passwd", "c.safetensors", ""] {
        let mut files = Files::sharded();
        let index = serde_json::json!({"weight_map": {"x": name}}).to_string();
        files.small.insert("model.safetensors.index.json".into(), index.into_bytes());
        files.large.insert("/etc/passwd".into(), Vec::new());
        Place::new().fails(&files.serve(), &["names", &format!("{name:?}"), "no file of the repository"]);
    }
}

#[test]
fn names_that_are_no_repositories() {
    let server = Server::start(|_, _| Answer::status(500));
    for name in ["", "model", "a/b/c", "../x", "a/b?c"] {
        let error = Place::new().pull_repo(&server, name).unwrap_err();
        assert!(matches!(&error, Error::Input(text) if text.contains("OWNER/NAME")), "{error}");
    }
    assert!(server.requests("").is_empty());
}

/// The directory has other files with the same ending besides the model's own.
#[test]
fn a_pattern_of_shards_brings_their_index() {
    let server = Files::sharded().serve();
    let pull = |pattern: &str| Place { file: Some(pattern.into()), ..Place::new() };
    let shards = ["a.safetensors", "b.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json"];
    for pattern in ["*.safetensors", "*"] {
        assert_eq!(names(&pull(pattern).pull(&server).unwrap()), shards, "{pattern}");
    }
    pull("a*").fails(&server, &["--file leaves out b.safetensors", "model.safetensors.index.json"]);
    assert_eq!(names(&pull("*.gguf").pull(&server).unwrap()), ["config.json", "model.gguf", "tokenizer.json"]);
    let whole = ["config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(names(&pull("*.safetensors").pull(&Files::one().serve()).unwrap()), whole);
}
