//! Models by name: from a cache, from a hub that the test plays, and from none. Needs the feature `hub`.

#![cfg(feature = "hub")]

#[path = "common/scene.rs"]
mod scene;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use scene::{Scene, error, rows};
use serde_json::json;

fn llama() -> Scene {
    Scene::new(json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8, "max_position_embeddings": 16,
    }))
}

fn perplexity(scene: &Scene, model: &str, variables: &[(&str, &str)]) -> Output {
    let text = scene.path("text.txt");
    let args = [
        "eval",
        "perplexity",
        "--json",
        "--model",
        model,
        "--text",
        text.to_str().unwrap(),
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    for name in [
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "HF_ENDPOINT",
        "http_proxy",
        "HTTP_PROXY",
    ] {
        command.env_remove(name);
    }
    command
        .args(args)
        .env("HF_HOME", scene.path("home"))
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// An address where nobody listens.
const NOWHERE: (&str, &str) = ("HF_ENDPOINT", "http://127.0.0.1:1");

/// Puts the scene's model into a cache as clients of the hub leave it.
fn seed(scene: &Scene, cache: &Path) {
    let model = cache.join("models--owner--name");
    let snapshot = model.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), COMMIT).unwrap();
    for file in std::fs::read_dir(scene.path("model")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), snapshot.join(file.file_name())).unwrap();
    }
}

#[test]
fn without_a_hub_the_cache_serves() {
    let scene = llama();
    seed(&scene, &scene.path("home/hub"));
    let folder = scene.path("model");
    let expected = rows(&perplexity(&scene, folder.to_str().unwrap(), &[])).remove(0);
    let commit = format!("hf:owner/name@{COMMIT}");
    for (name, variable) in [
        ("hf:owner/name", NOWHERE),
        ("hf:owner/name", ("HF_HUB_OFFLINE", "1")),
        (&commit, NOWHERE),
    ] {
        let found = rows(&perplexity(&scene, name, &[variable])).remove(0);
        assert_eq!(found["perplexity"], expected["perplexity"]);
        assert_eq!(found["model"], "owner/name");
    }
    let cache = scene.path("elsewhere");
    std::fs::rename(scene.path("home/hub"), &cache).unwrap();
    let cache = ("HF_HUB_CACHE", cache.to_str().unwrap());
    rows(&perplexity(&scene, "hf:owner/name", &[NOWHERE, cache]));
}

#[test]
fn without_hub_and_cache_the_error_says_so() {
    let scene = llama();
    let message = error(&perplexity(&scene, "hf:owner/name", &[NOWHERE]));
    for part in [
        "hf:owner/name: cannot reach the hub",
        "has no complete copy",
    ] {
        assert!(message.contains(part), "{message}");
    }
    let message = error(&perplexity(
        &scene,
        "hf:owner/name",
        &[("HF_HUB_OFFLINE", "1")],
    ));
    assert!(message.contains("HF_HUB_OFFLINE is set"), "{message}");
    seed(&scene, &scene.path("home/hub"));
    let snapshot = scene
        .path("home/hub/models--owner--name/snapshots")
        .join(COMMIT);
    std::fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    let message = error(&perplexity(&scene, "hf:owner/name", &[NOWHERE]));
    assert!(message.contains("has no complete copy"), "{message}");
}

/// A hub with one model, and what it was asked.
struct Hub {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn new(model: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, model) = (Arc::clone(&asked), model.to_path_buf());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, model) = (Arc::clone(&log), model.clone());
                std::thread::spawn(move || answer(stream, &model, &log));
            }
        });
        Self { address, asked }
    }

    fn files_asked(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        let files = asked
            .iter()
            .filter_map(|path| path.split(&format!("{COMMIT}/")).nth(1));
        let mut files: Vec<String> = files.map(String::from).collect();
        files.sort();
        files.dedup();
        files
    }
}

/// Answers one request and closes.
fn answer(mut stream: TcpStream, model: &Path, log: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let request = lines.next().unwrap().unwrap();
    let headers: Vec<String> = lines
        .map_while(Result::ok)
        .take_while(|l| !l.is_empty())
        .collect();
    let path = request.split(' ').nth(1).unwrap().to_owned();
    log.lock().unwrap().push(path.clone());
    let header = |name: &str| {
        let found = headers.iter().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        });
        found.unwrap_or_default()
    };
    let (status, extra, body) = if path.starts_with("/api/models/owner/gated") {
        match header("authorization").as_str() {
            "Bearer secret" => ("404 Not Found", String::new(), Vec::new()),
            _ => ("401 Unauthorized", String::new(), Vec::new()),
        }
    } else if path.starts_with("/api/models/owner/name/revision/main") {
        let files = std::fs::read_dir(model).unwrap();
        let files = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        let more = ["README.md", "pytorch_model.bin", "onnx/config.json"].map(String::from);
        let siblings: Vec<_> = files
            .chain(more)
            .map(|name| json!({"rfilename": name}))
            .collect();
        let info = json!({"sha": COMMIT, "siblings": siblings});
        (
            "200 OK",
            "Content-Type: application/json\r\n".into(),
            info.to_string().into_bytes(),
        )
    } else if let Some(file) = path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/")) {
        let bytes = std::fs::read(model.join(file)).unwrap();
        let range = header("range");
        let (start, end) = range
            .strip_prefix("bytes=")
            .unwrap()
            .split_once('-')
            .unwrap();
        let start: usize = start.parse().unwrap();
        let end = end.parse().map_or(bytes.len(), |end: usize| end + 1);
        let extra = format!(
            "Content-Range: bytes {start}-{}/{}\r\nETag: \"{file}-etag\"\r\nX-Repo-Commit: {COMMIT}\r\n",
            end - 1,
            bytes.len()
        );
        ("206 Partial Content", extra, bytes[start..end].to_vec())
    } else {
        ("404 Not Found", String::new(), Vec::new())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\n{extra}Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream
        .write_all(&[head.as_bytes(), &body].concat())
        .unwrap();
}

#[test]
fn a_model_is_fetched_once_and_only_what_is_needed() {
    let scene = llama();
    let folder = scene.path("model");
    let hub = Hub::new(&folder);
    let endpoint = ("HF_ENDPOINT", hub.address.as_str());
    let expected = rows(&perplexity(&scene, folder.to_str().unwrap(), &[])).remove(0);
    let found = rows(&perplexity(&scene, "hf:owner/name", &[endpoint])).remove(0);
    assert_eq!(found["perplexity"], expected["perplexity"]);
    let needed = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(hub.files_asked(), needed);
    let before = hub.asked.lock().unwrap().len();
    rows(&perplexity(&scene, "hf:owner/name", &[endpoint]));
    assert_eq!(
        hub.asked.lock().unwrap().len(),
        before + 1,
        "only whether the model is still the same"
    );
    rows(&perplexity(&scene, "hf:owner/name", &[NOWHERE]));
}

#[test]
fn what_the_hub_refuses_is_said_in_one_line() {
    let scene = llama();
    let hub = Hub::new(&scene.path("model"));
    let endpoint = ("HF_ENDPOINT", hub.address.as_str());
    let message = error(&perplexity(&scene, "hf:owner/absent", &[endpoint]));
    assert!(
        message.contains("hf:owner/absent: the hub has no such model"),
        "{message}"
    );
    let message = error(&perplexity(&scene, "hf:owner/gated", &[endpoint]));
    assert!(
        message.contains("private or gated") && message.contains("HF_TOKEN"),
        "{message}"
    );
    let message = error(&perplexity(
        &scene,
        "hf:owner/gated",
        &[endpoint, ("HF_TOKEN", "secret")],
    ));
    assert!(
        message.contains("no such model"),
        "the token was sent: {message}"
    );
    std::fs::create_dir_all(scene.path("home")).unwrap();
    std::fs::write(scene.path("home/token"), "secret\n").unwrap();
    let message = error(&perplexity(&scene, "hf:owner/gated", &[endpoint]));
    assert!(
        message.contains("no such model"),
        "the token of a login was sent: {message}"
    );
}

#[shared_data::needed("models/stories260K", "data/text")]
#[test]
fn a_trained_model_is_the_same_by_name() {
    let folder = Path::new(shared_data::path!("models/stories260K"));
    let scene = llama();
    let snapshots = scene.path("home/hub/models--owner--stories/snapshots");
    std::fs::create_dir_all(&snapshots).unwrap();
    let model = folder.canonicalize().unwrap();
    std::os::unix::fs::symlink(model, snapshots.join(COMMIT)).unwrap();
    let text = shared_data::path!("data/text/tinystories_valid_30KB.txt");
    std::fs::copy(text, scene.path("text.txt")).unwrap();
    let name = format!("hf:owner/stories@{COMMIT}");
    let row = rows(&perplexity(&scene, &name, &[("HF_HUB_OFFLINE", "1")])).remove(0);
    let expected = rows(&perplexity(&scene, folder.to_str().unwrap(), &[])).remove(0);
    assert_eq!(row["perplexity"], expected["perplexity"]);
}
