//! Changes and diffs on a real agent server, in a private repository that was cloned without naming a branch: the same
//! on every version, over the conversation's routes and over the cloud proxy.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::git_server::GitServer;
use crate::support::product::{Product, saying, text, with};
use crate::support::scripted_llm::{Reply, ScriptedLlm};

const TOKEN: &str = "token-of-the-git-host-77aa";

/// The agent's changes to the clone: every kind of change, and every kind of name.
const WORK: &str = r#"set -e
echo two >>changed.txt; rm 'deleted "文".txt'; git mv moved.txt 'moved -> here.txt'; rm -r folder; ln -s /etc folder
rm to-link; ln -s nowhere to-link; chmod +x script.sh; printf 'caf\351\n' >latin-1.txt; printf 'a\0b' >binary.bin
printf '\357\273\277mark\r\n' >mark.txt; printf '\377\376a\0\012\0' >utf-16.txt; : >empty.txt; mkdir -p './-x/[a]'; echo one >'-x/[a]/:(glob)*'
echo tab >"$(printf 'tab\there')"; echo line >"$(printf 'line\nbreak')"; echo bytes >"$(printf 'not-utf-8-\351')"
for i in $(seq 100000); do echo "line $i"; done >large.txt; head -c 6000000 /dev/zero | tr '\0' x >too-large.txt; mkfifo pipe
echo ignored >ignored.log; git add -N large.txt; git init -q nested; echo inside >'nested/in side'
git -c user.name=Ada -c user.email=ada@example.org commit -qam 'Some of it'; echo three >>changed.txt
"#;

#[tokio::test]
async fn every_change_of_a_private_repository_has_a_diff() {
    let llm = ScriptedLlm::start().await;
    let git = GitServer::start().await;
    let files = [
        ("changed.txt", "one\n", false),
        ("deleted \"文\".txt", "deleted\n", false),
        ("moved.txt", "moved\n", false),
        ("folder/file.txt", "in a folder\n", false),
        ("to-link", "file\n", false),
        ("script.sh", "true\n", false),
        ("unchanged.txt", "\n no line break at the end", false),
        (".gitignore", "*.log\n", false),
    ];
    git.create_repository("owner/private", &files, &["release"]).await;
    git.create_repository("owner/ahead", &[("changed.txt", "one\n", false)], &["release"]).await;
    git.require("someone", TOKEN);
    let product = Product::start(json!({
        "llm_model": "openai/scripted",
        "llm_api_key": "key-of-the-model",
        "llm_base_url": llm.base_url(),
        "provider_tokens": {"github": {"token": TOKEN, "host": git.url()}},
    }))
    .await;
    llm.reply_with(vec![Reply::text("Hello")]);
    let start =
        product.start_conversation(with(saying("Hello"), json!({"selected_repository": "owner/private"}))).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "finished").await;
    let agent = product.at_agent(&id).await;
    let folder = agent.folder().await;
    let both = BothRoutes::new(&product, &id).await;
    assert_eq!(both.ask("changes", ".").await, (200, json!([])), "nothing was changed yet");
    let asked_of_remote = git.requests().len();

    let ran = agent.run(&folder, WORK).await;
    assert_eq!(ran.exit_code, 0, "{ran:?}");
    let (status, changes) = both.ask("changes", ".").await;
    let shown: Vec<String> = changes
        .as_array()
        .unwrap_or_else(|| panic!("{status} {changes}"))
        .iter()
        .map(|change| format!("{} {}", text(&change["status"]), text(&change["path"])))
        .collect();
    let expected = [
        r#"ADDED "not-utf-8-\351""#,
        "ADDED -x/[a]/:(glob)*",
        "ADDED binary.bin",
        "UPDATED changed.txt",
        "DELETED deleted \"文\".txt",
        "ADDED empty.txt",
        "ADDED folder",
        "DELETED folder/file.txt",
        "ADDED large.txt",
        "ADDED latin-1.txt",
        "ADDED line\nbreak",
        "ADDED mark.txt",
        "ADDED moved -> here.txt",
        "DELETED moved.txt",
        "ADDED nested/in side",
        "UPDATED script.sh",
        "ADDED tab\there",
        "UPDATED to-link",
        "ADDED too-large.txt",
        "ADDED utf-16.txt",
    ];
    assert_eq!(shown, expected);
    for change in changes.as_array().expect("changes") {
        let path = text(&change["path"]);
        let (status, diff) = both.ask("diff", &path).await;
        match path.as_str() {
            "binary.bin" => assert!(status == 400 && text(&diff["detail"]).contains("binary"), "{status} {diff}"),
            "too-large.txt" => assert!(status == 413 && text(&diff["detail"]).contains("6000000"), "{status} {diff}"),
            _ => {
                assert!(status == 200 && diff["original"].is_string(), "{path}: {status}");
                match text(&change["status"]).as_str() {
                    "ADDED" => assert_eq!(diff["original"], "", "{path}"),
                    "DELETED" => assert_eq!(diff["modified"], "", "{path}"),
                    _ => {}
                }
            }
        }
    }
    let large = (1..=100_000).fold(String::new(), |text, number| text + &format!("line {number}\n"));
    for (path, original, modified) in [
        ("changed.txt", "one\n", "one\ntwo\nthree\n"),
        ("unchanged.txt", "\n no line break at the end", "\n no line break at the end"),
        ("deleted \"文\".txt", "deleted\n", ""),
        (r#""deleted \"\346\226\207\".txt""#, "deleted\n", ""),
        ("moved.txt", "moved\n", ""),
        ("folder/file.txt", "in a folder\n", ""),
        ("folder", "", "/etc"),
        ("to-link", "file\n", "nowhere"),
        ("script.sh", "true\n", "true\n"),
        ("latin-1.txt", "", "café\n"),
        ("mark.txt", "", "\u{feff}mark\r\n"),
        ("utf-16.txt", "", "a\n"),
        (r#""not-utf-8-\351""#, "", "bytes\n"),
        ("ignored.log", "", "ignored\n"),
        ("nested/in side", "", "inside\n"),
        ("large.txt", "", large.as_str()),
    ] {
        let (status, diff) = both.ask("diff", path).await;
        assert!((status, &diff) == (200, &json!({"modified": modified, "original": original})), "{path}: {status}");
    }
    for (route, path, status, reason) in [
        ("diff", "pipe", 400, "pipe"),
        ("diff", "nowhere", 404, "exists neither now nor"),
        ("diff", "-x", 400, "folder"),
        ("diff", "folder/passwd", 400, "inside the workspace"),
        ("diff", "changed.txt&ref=none", 400, "not a commit"),
        ("changes", "nowhere", 404, "does not exist"),
        ("changes", ".&ref=none", 400, "not a commit"),
    ] {
        let (found, answer) = both.ask(route, path).await;
        assert!(found == status && text(&answer["detail"]).contains(reason), "{route} {path}: {found} {answer}");
    }
    // The parent folder of the clone, and changes against the last commit.
    let parent = folder.parent().expect("a workspace").display().to_string();
    let (status, of_parent) = both.ask("changes", &parent).await;
    let names: Vec<String> =
        of_parent.as_array().expect("changes").iter().map(|change| text(&change["path"])).collect();
    assert_eq!((status, names.len()), (200, expected.len()), "{names:?}");
    // A repository inside the clone is listed without its files.
    for (name, modified) in
        [("private/changed.txt", "one\ntwo\nthree\n"), ("private/nested", "Subproject commit (none yet)\n")]
    {
        assert!(names.contains(&name.to_owned()), "{names:?}");
        let (status, diff) = both.ask("diff", &format!("{parent}/{name}")).await;
        assert_eq!((status, &diff["modified"]), (200, &json!(modified)), "{diff}");
    }
    let (_, since_commit) = both.ask("changes", ".&ref=HEAD").await;
    assert!(since_commit.as_array().expect("changes").contains(&json!({"status": "UPDATED", "path": "changed.txt"})));
    assert!(!since_commit.to_string().contains("moved.txt"), "{since_commit}");
    assert_eq!(git.requests().len(), asked_of_remote, "no request was sent to the remote");
    only_the_agents_changes_are_listed_on_a_branch_that_is_ahead(&product, &llm, &text(&both.row["sandbox_id"])).await;
    product.shutdown().await;
}

/// Also after the changes are committed, pushed, and on a branch that the agent created.
async fn only_the_agents_changes_are_listed_on_a_branch_that_is_ahead(
    product: &Product,
    llm: &ScriptedLlm,
    sandbox: &str,
) {
    llm.reply_with(vec![Reply::text("Hello")]);
    let request = json!({"selected_repository": "owner/ahead", "selected_branch": "release", "sandbox_id": sandbox});
    let start = product.start_conversation(with(saying("Hello again"), request)).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "finished").await;
    let agent = product.at_agent(&id).await;
    let folder = agent.folder().await;
    let both = BothRoutes::new(product, &id).await;
    assert_eq!(both.ask("changes", ".").await, (200, json!([])), "nothing was changed yet");
    let push = format!(
        "git -c credential.helper= -c credential.helper='!f() {{ echo username=someone; echo password={TOKEN}; }}; f' push -q origin"
    );
    for step in [
        "echo two >>changed.txt",
        "git -c user.name=Ada -c user.email=ada@example.org commit -qam 'Some of it'",
        &format!("{push} release"),
        "git checkout -q -b fix",
        &format!("{push} fix"),
    ] {
        let ran = agent.run(&folder, step).await;
        assert_eq!(ran.exit_code, 0, "{ran:?}");
        let changes = both.ask("changes", ".").await;
        assert_eq!(changes, (200, json!([{"status": "UPDATED", "path": "changed.txt"}])), "{step}");
        let (_, diff) = both.ask("diff", "changed.txt").await;
        assert_eq!(diff, json!({"modified": "one\ntwo\n", "original": "one\n"}), "{step}");
    }
}

/// Sends each request over both routes, and asserts that the responses are equal.
struct BothRoutes<'a> {
    product: &'a Product,
    id: &'a str,
    row: Value,
    folder: String,
}

impl<'a> BothRoutes<'a> {
    async fn new(product: &'a Product, id: &'a str) -> Self {
        let row = product.conversation(id).await;
        let folder = product.at_agent(id).await.folder().await;
        Self { product, id, row, folder: known(&folder) }
    }

    /// `path` is relative to the conversation's folder, or absolute; `&ref=` may follow.
    async fn ask(&self, route: &str, path: &str) -> (u16, Value) {
        let (path, reference) = path.split_once("&ref=").map_or((path, ""), |(path, name)| (path, name));
        let reference = if reference.is_empty() { String::new() } else { format!("&ref={reference}") };
        let encode = |path: &str| path.bytes().fold(String::new(), |text, byte| text + &format!("%{byte:02X}"));
        let target = format!("/api/v1/app-conversations/{}/git/{route}?path={}{reference}", self.id, encode(path));
        let direct = reqwest::get(format!("{}{target}", self.product.address())).await.expect("an answer");
        let (status, answer) = (direct.status().as_u16(), direct.json::<Value>().await.expect("JSON"));

        // In the form in which the web UI builds these requests.
        let absolute = if path.starts_with('/') { known(Path::new(path)) } else { format!("{}/{path}", self.folder) };
        let host = text(&self.row["conversation_url"]).split("/api/").next().expect("a host").to_owned();
        let request = json!({
            "host": host, "method": "GET", "path": format!("/api/git/{route}?path={}{reference}", encode(&absolute)),
            "headers": {"X-Session-API-Key": self.row["session_api_key"]},
        });
        let passed = self.product.post_to("/api/cloud-proxy", &request).send().await.expect("an answer");
        let passed = (passed.status().as_u16(), passed.json::<Value>().await.expect("JSON"));
        assert!(passed == (status, answer.clone()), "{route} {path}: {} instead of {status}", passed.0);
        (status, answer)
    }
}

/// A folder of the sandbox, by the path that web pages use.
fn known(folder: &Path) -> String {
    let folder = folder.display().to_string();
    folder.split_once("/workspace/project").map_or(folder.clone(), |(_, rest)| format!("/workspace/project{rest}"))
}
