//! Git providers, repositories and branches in the forms that people paste: the normalised form that settings store,
//! and the selections that starts and updates of a conversation both accept or both refuse.

use proptest::strategy::Strategy as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use proptest::{prop_assert, prop_assert_eq};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use shared::config::{SandboxConfig, StartConfig};
use shared::error::Error;
use shared::start::task::StartStatus;
use shared::user::UserId;
use shared::user::git::ProviderType;
use shared::user::git::{Repository, normal_host, without_credentials};
use shared::user::settings::Settings;
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::api::Api;
use crate::support::git_server::GitServer;
use crate::support::seed;
use crate::support::worker_harness::{WorkerHarness, quick};

const API: &str = "/api/v1/app-conversations";
const MASK: &str = "**********";
/// A part of everything that must not be stored or shown.
const CANARY: &str = "canary-7731";

/// The user's providers for the table below.
fn providers() -> Value {
    json!({
        "github": {"token": "ghp-1"},
        "gitlab": {"token": "glpat-1", "host": "https://gitlab.example:8443/gitlab/api/v4"},
        "bitbucket_data_center": {"token": "me:t", "host": "bb.example/context"},
        "azure_devops": {"token": "pat", "host": "contoso"},
        "forgejo": {"token": "t"},
    })
}

/// Repository, branch and provider of the request, and their values in the record; or the field that is refused.
#[allow(clippy::type_complexity, reason = "a table")]
const SELECTIONS: &[([Option<&str>; 3], Result<[Option<&str>; 3], &str>)] = {
    const GH: Option<&str> = Some("github");
    const GL: Option<&str> = Some("gitlab");
    const DC: Option<&str> = Some("bitbucket_data_center");
    const AZ: Option<&str> = Some("azure_devops");
    const REPOSITORY: Result<[Option<&str>; 3], &str> = Err("selected_repository");
    const BRANCH: Result<[Option<&str>; 3], &str> = Err("selected_branch");
    const OR: Option<&str> = Some("o/r");
    &[
        ([OR, None, None], Ok([OR, None, None])),
        ([OR, Some("main"), GH], Ok([OR, Some("main"), GH])),
        ([Some(" o/r "), None, None], Ok([OR, None, None])),
        ([Some("\to/r\n"), Some(" main "), None], Ok([OR, Some("main"), None])),
        ([Some("o/r.git"), None, None], Ok([OR, None, None])),
        ([Some("o/r/"), None, None], Ok([OR, None, None])),
        ([Some("/o/r"), None, None], Ok([OR, None, None])),
        ([Some("'o/r'"), None, None], Ok([OR, None, None])),
        ([Some("o/r.js"), None, GH], Ok([Some("o/r.js"), None, GH])),
        ([Some("g/s/r"), None, None], Ok([Some("g/s/r"), None, None])),
        ([Some("g/s/t/r"), None, GL], Ok([Some("g/s/t/r"), None, GL])),
        ([Some("My Project/r"), None, AZ], Ok([Some("My Project/r"), None, AZ])),
        ([Some("contoso/My Project/r"), None, AZ], Ok([Some("contoso/My Project/r"), None, AZ])),
        ([Some("PRJ/r"), None, DC], Ok([Some("PRJ/r"), None, DC])),
        ([Some("https://github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("HTTPS://GitHub.com/o/r.git/"), None, None], Ok([OR, None, GH])),
        ([Some("http://www.github.com/o/r"), None, GH], Ok([OR, None, GH])),
        ([Some("github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("//github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("git@github.com:o/r.git"), None, None], Ok([OR, None, GH])),
        ([Some("github.com:o/r"), None, None], Ok([OR, None, GH])),
        ([Some("github:o/r"), None, None], Ok([OR, None, GH])),
        ([Some("ssh://git@github.com/o/r.git"), None, None], Ok([OR, None, GH])),
        ([Some("ssh://git@ssh.github.com:443/o/r.git"), None, None], Ok([OR, None, GH])),
        ([Some("ssh://git@github.com:o/r.git"), None, None], Ok([OR, None, GH])),
        ([Some("git://github.com/o/r.git"), None, None], Ok([OR, None, GH])),
        ([Some("git clone https://github.com/o/r.git"), None, None], Ok([OR, None, GH])),
        ([Some("https://github.dev/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("https://api.github.com/repos/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("https://github.com/o/r?tab=readme-ov-file#readme"), None, None], Ok([OR, None, GH])),
        ([Some("https://github.com/o/r/issues/12"), None, None], Ok([OR, None, GH])),
        ([Some("https://github.com/o/r/tree/dev"), None, None], Ok([OR, Some("dev"), GH])),
        ([Some("https://github.com/o/r/tree/dev/docs"), Some("dev"), None], Ok([OR, Some("dev"), GH])),
        ([Some("https://github.com/o/r/blob/dev/README.md"), None, None], Ok([OR, Some("dev"), GH])),
        ([Some("https://me:canary-7731@github.com/o/r.git"), None, None], Ok([OR, None, GH])),
        ([Some("https://canary-7731@github.com/o/r.git"), None, None], Ok([OR, None, GH])),
        ([Some("me:canary-7731@github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("https://me:canary-7731/x@github.com/o/r.git"), None, None], Ok([OR, None, GH])),
        ([Some("https://github.com/o/r?access_token=canary-7731"), None, None], Ok([OR, None, GH])),
        ([Some("https://gitlab.example:8443/gitlab/g/s/r"), None, None], Ok([Some("g/s/r"), None, GL])),
        ([Some("https://gitlab.example:8443/gitlab/g/r/-/tree/dev"), None, GL], Ok([Some("g/r"), Some("dev"), GL])),
        (
            [Some("https://gitlab.example:8443/gitlab/api/v4/projects/g%2Fs%2Fr"), None, None],
            Ok([Some("g/s/r"), None, GL]),
        ),
        ([Some("git@gitlab.example:g/s/r.git"), None, None], Ok([Some("g/s/r"), None, GL])),
        ([Some("ssh://git@gitlab.example:2222/g/r.git"), None, None], Ok([Some("g/r"), None, GL])),
        ([Some("https://codeberg.org/o/r/src/branch/dev"), None, None], Ok([OR, Some("dev"), Some("forgejo")])),
        ([Some("https://bitbucket.org/w/r/src/dev"), None, None], Ok([Some("w/r"), Some("dev"), Some("bitbucket")])),
        ([Some("https://bitbucket.org/w/r/branch/a/b"), None, None], Ok([Some("w/r"), Some("a/b"), Some("bitbucket")])),
        ([Some("https://bb.example/context/scm/prj/r.git"), None, None], Ok([Some("prj/r"), None, DC])),
        (
            [Some("https://bb.example/context/projects/PRJ/repos/r/browse?at=refs%2Fheads%2Fdev"), None, None],
            Ok([Some("PRJ/r"), Some("dev"), DC]),
        ),
        ([Some("https://bb.example/context/users/jo/repos/r"), None, None], Ok([Some("~jo/r"), None, DC])),
        (
            [Some("https://contoso@dev.azure.com/contoso/My%20Project/_git/r"), None, None],
            Ok([Some("contoso/My Project/r"), None, AZ]),
        ),
        (
            [Some("https://dev.azure.com/contoso/p/_git/r?version=GBdev"), None, None],
            Ok([Some("contoso/p/r"), Some("dev"), AZ]),
        ),
        ([Some("https://dev.azure.com/contoso/_git/p"), None, None], Ok([Some("contoso/p/p"), None, AZ])),
        ([Some("git@ssh.dev.azure.com:v3/contoso/p/r"), None, None], Ok([Some("contoso/p/r"), None, AZ])),
        (
            [Some("https://contoso.visualstudio.com/DefaultCollection/p/_git/r"), None, None],
            Ok([Some("contoso/p/r"), None, AZ]),
        ),
        ([OR, Some("refs/heads/feature/a"), None], Ok([OR, Some("feature/a"), None])),
        ([OR, Some(" "), None], Ok([OR, None, None])),
        ([OR, Some("feature/#1-ä"), None], Ok([OR, Some("feature/#1-ä"), None])),
        ([Some(" "), None, None], Ok([None, None, None])),
        ([Some("norepo"), None, None], REPOSITORY),
        ([Some("o/"), None, None], REPOSITORY),
        ([Some("o//r"), None, None], REPOSITORY),
        ([Some("o/../r"), None, None], REPOSITORY),
        ([Some("-o/r"), None, None], REPOSITORY),
        ([Some("o/r;id"), None, None], REPOSITORY),
        ([Some("o/$(id)"), None, None], REPOSITORY),
        ([Some("o/\u{1}r"), None, None], REPOSITORY),
        ([Some("o/.git"), None, None], REPOSITORY),
        ([Some("a/b/c"), None, GH], REPOSITORY),
        ([Some("p/r/x/y"), None, AZ], REPOSITORY),
        ([Some("g/s/r"), None, DC], REPOSITORY),
        ([Some("o/my repo"), None, GH], REPOSITORY),
        ([Some("https://github.com/o"), None, None], REPOSITORY),
        ([Some("https://github.com/"), None, None], REPOSITORY),
        ([Some("https://github.com/o/r/tree/a/b"), None, None], REPOSITORY),
        ([Some("https://git.elsewhere.example/o/r"), None, None], REPOSITORY),
        ([Some("https://me:canary-7731@git.elsewhere.example/o/r"), None, None], REPOSITORY),
        ([Some("https://gitlab.com/g/r"), None, None], REPOSITORY),
        ([Some("https://gitlab.example/gitlab/g/r"), None, None], REPOSITORY),
        ([Some("https://github.com/o/r"), None, GL], REPOSITORY),
        ([Some("github:o/r"), None, GL], REPOSITORY),
        ([Some("ftp://github.com/o/r"), None, None], REPOSITORY),
        ([Some("file:///srv/o/r"), None, None], REPOSITORY),
        ([Some("https://git hub.com/o/r"), None, None], REPOSITORY),
        ([OR, Some("a b"), None], BRANCH),
        ([OR, Some("a;b"), None], BRANCH),
        ([OR, Some("a..b"), None], BRANCH),
        ([OR, Some("-b"), None], BRANCH),
        ([OR, Some("a~1"), None], BRANCH),
        ([OR, Some("a.lock"), None], BRANCH),
        ([OR, Some("HEAD"), None], Ok([OR, None, None])),
        ([OR, Some("@"), GH], Ok([OR, None, GH])),
        ([Some("https://github.com/o/r/tree/dev"), Some("HEAD"), None], Ok([OR, None, GH])),
        ([Some("https://github.com/o/r/tree/HEAD"), None, None], Ok([OR, None, GH])),
        ([Some("https://github.com/o/r/blob/HEAD/docs/README.md"), None, None], Ok([OR, None, GH])),
        ([OR, Some("\"main\""), None], Ok([OR, Some("main"), None])),
        ([OR, Some("'main'"), None], Ok([OR, Some("main"), None])),
        ([OR, Some("\u{feff}main\u{200b}"), None], Ok([OR, Some("main"), None])),
        ([OR, Some("ma\u{200b}in"), None], BRANCH),
        // Credentials without a scheme, with a misspelled scheme, with any user name, and passwords that look like a
        // port.
        ([Some("github.com/o/r?access_token=canary-7731"), None, None], Ok([OR, None, GH])),
        ([Some("www.github.com/o/r.git?private_token=canary-7731"), None, None], Ok([OR, None, GH])),
        ([Some("github.com/o/r#token=canary-7731"), None, None], Ok([OR, None, GH])),
        ([Some("https://github.com/o/r?pat=canary-7731"), None, None], Ok([OR, None, GH])),
        ([Some("https://github.com/o/r?canary-7731"), None, None], Ok([OR, None, GH])),
        ([Some("https://user:8443/canary-7731@github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("https:/u:canary-7731@github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("https//u:canary-7731@github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("htps:/u:canary-7731@github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("u:canary-7731@https://github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("https://u%3Acanary-7731%40github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("git clone https://u:canary-7731@github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("gitlab.com/g/r.git?private_token=canary-7731"), None, None], REPOSITORY),
        ([Some("https%3A%2F%2Fu%3Acanary-7731%40github.com%2Fo%2Fr"), None, None], REPOSITORY),
        ([Some("o/u:canary-7731@r"), None, None], REPOSITORY),
        // Only the names of parameters show whether they are secret.
        (
            [Some("https://dev.azure.com/contoso/p/_git/r?version=GBdesign"), None, None],
            Ok([Some("contoso/p/r"), Some("design"), AZ]),
        ),
        (
            [
                Some("https://dev.azure.com/contoso/p/_git/r?path=/key.txt&version=GBfeature%2Fauth&pat=canary-7731"),
                None,
                None,
            ],
            Ok([Some("contoso/p/r"), Some("feature/auth"), AZ]),
        ),
        (
            [
                Some("https://bb.example/context/projects/PRJ/repos/r/browse?at=refs%2Fheads%2Ffeature%2Foauth"),
                None,
                None,
            ],
            Ok([Some("PRJ/r"), Some("feature/oauth"), DC]),
        ),
        // Tags and commits.
        (
            [Some("https://dev.azure.com/contoso/p/_git/r?version=GTv1"), None, None],
            Ok([Some("contoso/p/r"), Some("refs/tags/v1"), AZ]),
        ),
        (
            [Some("https://dev.azure.com/contoso/p/_git/r?version=GCabc1234"), None, None],
            Ok([Some("contoso/p/r"), Some("abc1234"), AZ]),
        ),
        (
            [Some("https://dev.azure.com/contoso/p/_git/r/commit/abc1234?refName=refs%2Fheads%2Fmain"), None, None],
            Ok([Some("contoso/p/r"), Some("abc1234"), AZ]),
        ),
        (
            [Some("https://bb.example/context/projects/PRJ/repos/r/commits/abc1234"), None, None],
            Ok([Some("PRJ/r"), Some("abc1234"), DC]),
        ),
        ([Some("https://github.com/o/r/releases/tag/v1"), None, None], Ok([OR, Some("refs/tags/v1"), GH])),
        ([Some("https://github.com/o/r/releases/latest"), None, None], Ok([OR, None, GH])),
        ([Some("https://github.com/o/r/commit/abc1234"), None, None], Ok([OR, Some("abc1234"), GH])),
        ([Some("https://github.com/o/r/tree/refs/tags/v1"), None, None], Ok([OR, Some("refs/tags/v1"), GH])),
        ([Some("https://github.com/o/r/blob/refs/heads/dev/a.txt"), None, None], Ok([OR, Some("dev"), GH])),
        ([Some("https://raw.githubusercontent.com/o/r/refs/heads/dev/a.txt"), None, None], Ok([OR, Some("dev"), GH])),
        ([Some("https://codeberg.org/o/r/src/tag/v1"), None, None], Ok([OR, Some("refs/tags/v1"), Some("forgejo")])),
        (
            [Some("https://codeberg.org/o/r/src/commit/abc1234/docs/a.md"), None, None],
            Ok([OR, Some("abc1234"), Some("forgejo")]),
        ),
        ([Some("https://codeberg.org/o/r/src/tag/v1/docs/a.md"), None, None], REPOSITORY),
        (
            [Some("https://bitbucket.org/w/r/commits/abc1234"), None, None],
            Ok([Some("w/r"), Some("abc1234"), Some("bitbucket")]),
        ),
        (
            [Some("https://bitbucket.org/w/r/commits/tag/v1"), None, None],
            Ok([Some("w/r"), Some("refs/tags/v1"), Some("bitbucket")]),
        ),
        (
            [Some("https://gitlab.example:8443/gitlab/g/r/-/tags/v1"), None, None],
            Ok([Some("g/r"), Some("refs/tags/v1"), GL]),
        ),
        (
            [Some("https://gitlab.example:8443/gitlab/g/r/-/commit/abc1234"), None, None],
            Ok([Some("g/r"), Some("abc1234"), GL]),
        ),
        ([Some("git+https://github.com/o/r.git#dev"), None, None], Ok([OR, Some("dev"), GH])),
        ([Some("git@github.com:o/r.git#dev"), None, None], Ok([OR, Some("dev"), GH])),
        // Percent-encoded names, and the marker in Azure DevOps addresses.
        ([Some("contoso/My%20Project/r"), None, AZ], Ok([Some("contoso/My Project/r"), None, AZ])),
        ([Some("My Project/_git/r"), None, AZ], Ok([Some("My Project/r"), None, AZ])),
        ([Some("contoso/p/_git/r"), None, AZ], Ok([Some("contoso/p/r"), None, AZ])),
        ([Some("contoso/p/_git/r"), None, None], Ok([Some("contoso/p/r"), None, None])),
        ([Some("contoso/_git/p"), None, AZ], Ok([Some("contoso/p/p"), None, AZ])),
        ([Some("contoso/My%2520Project/r"), None, AZ], REPOSITORY),
        ([Some("contoso/_git/_git/r"), None, AZ], REPOSITORY),
        // Invalid names.
        ([Some("o/r@main"), None, None], REPOSITORY),
        ([Some("o/r.git@main"), None, GH], REPOSITORY),
        ([Some("github.com/o/r.git@v1"), None, None], REPOSITORY),
        ([Some("git+https://github.com/o/r.git@main#egg=x"), None, None], REPOSITORY),
        ([Some("git@github.com:o/r@main"), None, None], REPOSITORY),
        ([Some("o/r#dev"), None, None], REPOSITORY),
        ([Some("github:o/r#dev"), None, None], REPOSITORY),
        ([Some("o/r,"), None, GH], REPOSITORY),
        ([Some("o/r!"), None, GL], REPOSITORY),
        ([Some("o/(r)"), None, GH], REPOSITORY),
        ([Some("o/r."), None, None], REPOSITORY),
        ([Some("~/r"), None, GH], REPOSITORY),
        ([Some("~/r"), None, DC], REPOSITORY),
        ([Some("~jo/r"), None, GH], REPOSITORY),
        ([Some("~jo/r"), None, DC], Ok([Some("~jo/r"), None, DC])),
        ([Some("o/r\u{200b}x"), None, None], REPOSITORY),
        ([Some("o/r\u{202e}"), None, GH], Ok([OR, None, GH])),
        ([Some("contoso/p/r\u{202e}x"), None, AZ], REPOSITORY),
        ([Some("o/ü"), None, Some("forgejo")], REPOSITORY),
        ([Some("https://github.com/orgs/o/repositories"), None, None], REPOSITORY),
        ([Some("https://github.com/settings/tokens"), None, None], REPOSITORY),
        ([Some("https://gitlab.example:8443/gitlab/groups/g/-/projects"), None, None], REPOSITORY),
        ([Some("https://codeberg.org/explore/repos"), None, None], REPOSITORY),
        ([Some("https//github.com/o/r"), None, None], Ok([OR, None, GH])),
        ([Some("https/github.com/o/r"), None, GL], Ok([Some("https/github.com/o/r"), None, GL])),
    ]
};

async fn api(folder: &TempDir) -> Api {
    Api::at(folder.path(), SandboxConfig::None).await
}

async fn conversation(api: &Api, user: &UserId) -> Uuid {
    let id = Uuid::new_v4();
    let row = json!({"type": "conversation", "data": {"id": id, "sandbox_id": "s",
        "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"}});
    seed::load(&api.stores, user, [row]).await;
    id
}

fn place(answer: &Value) -> String {
    let violations = answer["detail"].as_array().unwrap_or_else(|| panic!("no violations: {answer}"));
    assert_eq!(violations.len(), 1, "{answer}");
    assert_eq!(violations[0]["type"], "value_error", "{answer}");
    let steps = violations[0]["loc"].as_array().expect("a place");
    steps[1..].iter().map(|step| step.as_str().expect("a name")).collect::<Vec<_>>().join(".")
}

#[tokio::test(flavor = "multi_thread")]
async fn start_and_update_accept_and_refuse_the_same_selections() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let settings = json!({"provider_tokens": providers()});
    let stored = api.call(&user, "POST", "/api/v1/settings", Some(&settings)).await;
    assert_eq!(stored.0, 200, "{stored:?}");
    let mut wrong = Vec::new();
    let mut started = 0;
    for ([repository, branch, provider], expected) in SELECTIONS {
        let mut body = json!({"selected_repository": repository});
        for (name, value) in [("selected_branch", branch), ("git_provider", provider)] {
            if let Some(value) = value {
                body[name] = (*value).into();
            }
        }
        let (status, task) = api.call(&user, "POST", API, Some(&body)).await;
        let id = conversation(&api, &user).await;
        let (patch_status, shown) = api.call(&user, "PATCH", &format!("{API}/{id}"), Some(&body)).await;
        for answer in [&task, &shown] {
            assert!(!answer.to_string().contains(CANARY), "{body}: {answer}");
        }
        match expected {
            Ok(selection) => {
                let found = ["selected_repository", "selected_branch", "git_provider"].map(|name| shown[name].as_str());
                if (status, patch_status, found) != (200, 200, *selection) {
                    wrong.push(format!("{body}: {status} {patch_status} {shown} {task}"));
                }
                started += 1;
                let request = &task["request"];
                let is_repository = selection[0].is_some();
                let is_cleaned =
                    [CANARY, "contoso@", "#readme", "refName"].iter().any(|part| body.to_string().contains(part));
                if status == 200 && is_repository && !is_cleaned {
                    assert_eq!(
                        request["selected_repository"], body["selected_repository"],
                        "the task shows the repository as sent"
                    );
                }
            }
            Err(field) => {
                if (status, patch_status) != (422, 422) {
                    wrong.push(format!("{body}: {status} {patch_status} {shown} {task}"));
                } else if (place(&task).as_str(), &task) != (*field, &shown) {
                    wrong.push(format!("{body}: {task} {shown}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    let count = api.call(&user, "GET", &format!("{API}/start-tasks/count"), None).await;
    assert_eq!(count, (200, json!(started)), "refused requests create no task");
    assert_eq!(api.call(&user, "GET", "/api/v1/sandboxes/search", None).await.1["items"], json!([]));
    api.stop().await;
}

/// Features that only starts have: suggested tasks, parents, streams, and hosts that are not allowed.
#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_start_validates_its_selection() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let post = async |path: &str, body: Value| api.call(&user, "POST", &format!("{API}{path}"), Some(&body)).await;
    let suggested = |repo: &str| {
        json!({"suggested_task": {"git_provider": "github", "task_type": "OPEN_ISSUE", "repo": repo, "issue_number": 1,
            "title": "T"}})
    };
    let (status, answer) = post("", suggested("https://me:canary-7731@gitlab.com/o/r")).await;
    assert_eq!((status, place(&answer).as_str()), (422, "suggested_task.repo"), "{answer}");
    assert!(!answer.to_string().contains(CANARY), "{answer}");
    let (status, task) = post("", suggested("https://me:canary-7731@github.com/o/r.git")).await;
    assert_eq!(status, 200, "{task}");
    assert!(!task.to_string().contains(CANARY), "{task}");
    let (status, answer) = post("/stream-start", json!({"selected_repository": "norepo"})).await;
    assert_eq!((status, place(&answer).as_str()), (422, "selected_repository"), "{answer}");
    let (status, answer) = post("", json!({"selected_branch": "main"})).await;
    assert_eq!((status, place(&answer).as_str()), (422, "selected_branch"), "{answer}");

    let both = json!({"selected_repository": "norepo", "selected_branch": "a b"});
    let one = conversation(&api, &user).await;
    for (method, path) in [("POST", API.to_owned()), ("PATCH", format!("{API}/{one}"))] {
        let (status, answer) = api.call(&user, method, &path, Some(&both)).await;
        let fields: Vec<&Value> = (0..2).map(|index| &answer["detail"][index]["loc"][1]).collect();
        assert_eq!((status, fields), (422, vec![&json!("selected_repository"), &json!("selected_branch")]), "{answer}");
    }

    // A parent's record may hold a value that an earlier version accepted; its children inherit it.
    let parent = Uuid::new_v4();
    let row = json!({"type": "conversation", "data": {"id": parent, "sandbox_id": "s", "selected_repository": "of/an/earlier/one",
        "selected_branch": "a b", "git_provider": "github", "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"}});
    seed::load(&api.stores, &user, [row]).await;
    let (_, shown) = api.call(&user, "GET", &format!("{API}?ids={parent}"), None).await;
    assert_eq!(shown[0]["selected_repository"], "of/an/earlier/one", "{shown}");
    let (status, task) = post("", json!({"parent_conversation_id": parent})).await;
    assert_eq!((status, &task["request"]["selected_repository"]), (200, &json!("of/an/earlier/one")), "{task}");
    // A child may select a repository on another host than its parent's.
    let own = json!({"parent_conversation_id": parent, "selected_repository": "https://codeberg.org/o/r", "selected_branch": "b"});
    let (status, task) = post("", own).await;
    assert_eq!((status, &task["request"]["git_provider"]), (200, &json!("forgejo")), "{task}");
    // A child inherits its parent's branch only for the same repository.
    let parent_id = Uuid::new_v4();
    let row = json!({"type": "conversation", "data": {"id": parent_id, "sandbox_id": "s", "selected_repository": "o/a",
        "selected_branch": "feature", "git_provider": "github", "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"}});
    seed::load(&api.stores, &user, [row]).await;
    for (own, branch, expected) in [
        (Value::Null, None, Some("feature")),
        (json!("o/a"), None, Some("feature")),
        (json!("https://github.com/O/a.git"), None, Some("feature")),
        (json!("https://github.com/o/a/tree/dev"), None, Some("dev")),
        (json!("o/b"), None, None),
        (json!("https://codeberg.org/o/a"), None, None),
        (json!("o/b"), Some("dev"), Some("dev")),
        (json!("o/a"), Some("HEAD"), None),
        (Value::Null, Some("@"), None),
    ] {
        let body = json!({"parent_conversation_id": parent_id, "selected_repository": own, "selected_branch": branch});
        let (status, task) = post("", body.clone()).await;
        assert_eq!((status, task["request"]["selected_branch"].as_str()), (200, expected), "{body} {task}");
    }
    // A start without a repository can have neither a branch nor a provider; an update may set them before the
    // repository.
    for (field, value) in [("selected_branch", "main"), ("git_provider", "gitlab"), ("selected_branch", "refs/heads/x")]
    {
        let one = conversation(&api, &user).await;
        let path = format!("{API}/{one}");
        let without = json!({"selected_repository": null, field: value});
        for (method, path, body) in
            [("POST", API, json!({field: value})), ("POST", API, without.clone()), ("PATCH", &path, without)]
        {
            let (status, answer) = api.call(&user, method, path, Some(&body)).await;
            assert_eq!((status, place(&answer).as_str()), (422, field), "{method} {answer}");
        }
        let (status, answer) = api.call(&user, "PATCH", &path, Some(&json!({field: value}))).await;
        assert_eq!((status, &answer[field]), (200, &json!(value.trim_start_matches("refs/heads/"))), "{answer}");
    }
    // An invalid value in the record does not prevent updates of other fields.
    for change in [json!({"title": "t"}), json!({"selected_branch": "main"}), json!({"git_provider": "gitlab"})] {
        let (status, answer) = api.call(&user, "PATCH", &format!("{API}/{parent}"), Some(&change)).await;
        assert_eq!((status, &answer["selected_repository"]), (200, &json!("of/an/earlier/one")), "{change} {answer}");
    }
    let elsewhere = json!({"selected_repository": "https://codeberg.org/o/r", "selected_branch": "b"});
    let (status, shown) = api.call(&user, "PATCH", &format!("{API}/{parent}"), Some(&elsewhere)).await;
    assert_eq!((status, &shown["git_provider"]), (200, &json!("forgejo")), "{shown}");

    let insecure = json!({"provider_tokens": {"github": {"token": "t", "host": "http://git.example/api/v3"}}});
    assert_eq!(api.call(&user, "POST", "/api/v1/settings", Some(&insecure)).await.0, 200);
    let (status, answer) = post("", json!({"selected_repository": "o/r"})).await;
    assert_eq!((status, place(&answer).as_str()), (422, "selected_repository"), "{answer}");
    assert!(answer.to_string().contains("git.example is an unencrypted git host"), "{answer}");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_hosts_are_stored_in_a_normalised_form() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let store = api.stores.settings();
    let first = json!({"github": {"token": "ghp-0", "host": "git.example"}});
    for (change, expected) in [
        (json!({"github": {"token": " Bearer ghp-1\n"}}), Ok((Some("ghp-1"), json!("git.example")))),
        (json!({"github": {"token": "\"token ghp-1\""}}), Ok((Some("ghp-1"), json!("git.example")))),
        // A blank, masked or missing token means the stored one; the host is the new one.
        (
            json!({"github": {"token": "", "host": "https://other.example/api/v3"}}),
            Ok((Some("ghp-0"), json!("other.example"))),
        ),
        (
            json!({"github": {"token": " \t", "host": " HTTPS://Other.Example:443/ "}}),
            Ok((Some("ghp-0"), json!("other.example"))),
        ),
        (
            json!({"github": {"token": null, "host": "http://127.0.0.1:3482/api/v3"}}),
            Ok((Some("ghp-0"), json!("http://127.0.0.1:3482"))),
        ),
        (json!({"github": {"token": MASK}}), Ok((Some("ghp-0"), json!("git.example")))),
        (json!({"github": {"host": ""}}), Ok((Some("ghp-0"), Value::Null))),
        (json!({"github": {"token": "", "host": null}}), Ok((Some("ghp-0"), Value::Null))),
        (json!({"github": {"token": "", "user_id": null}}), Ok((Some("ghp-0"), json!("git.example")))),
        (json!({"github": {}}), Ok((Some("ghp-0"), json!("git.example")))),
        (json!({"gitlab": {"token": " ", "host": "gitlab.example"}}), Ok((Some("ghp-0"), json!("git.example")))),
        (json!({"github": null}), Ok((None, Value::Null))),
        (json!({"github": {"token": "ghp\ncanary-7731"}}), Err("github.token")),
        (json!({"github": {"token": "https://me:canary-7731@github.com"}}), Err("github.token")),
        (json!({"github": {"host": "https://me:canary-7731@git.example"}}), Err("github.host")),
        (json!({"github": {"host": "me:canary-7731@git.example"}}), Err("github.host")),
        (json!({"github": {"host": "https://me:canary-7731@a host"}}), Err("github.host")),
        (json!({"github": {"host": "https://user:12/canary-7731@git.example"}}), Err("github.host")),
        (json!({"github": {"host": "https:/u:canary-7731@git.example"}}), Err("github.host")),
        (json!({"github": {"host": "https//u:canary-7731@git.example"}}), Err("github.host")),
        (json!({"github": {"host": "u%3Acanary-7731%40git.example"}}), Err("github.host")),
        (json!({"github": {"host": "https/u%3Acanary-7731%40git.example"}}), Err("github.host")),
        (json!({"gitlab": {"host": "https://canary-7731@gitlab.example/x@y"}}), Err("gitlab.host")),
        (
            json!({"github": {"host": "https://other.example?private_token=canary-7731#canary-7731"}}),
            Ok((Some("ghp-0"), json!("other.example"))),
        ),
        (json!({"github": {"token": "export GITHUB_TOKEN='ghp-1'"}}), Ok((Some("ghp-1"), json!("git.example")))),
        (
            json!({"github": {"token": "Authorization: Basic bWU6Z2hwLTE="}}),
            Ok((Some("me:ghp-1"), json!("git.example"))),
        ),
        (json!({"github": {"token": "token: ghp-1"}}), Ok((Some("ghp-1"), json!("git.example")))),
        (json!({"github": {"token": "canary-7731\u{200b}x"}}), Err("github.token")),
        (json!({"github": {"token": "canary-7731-é"}}), Err("github.token")),
        (json!({"github": {"host": "ftp://git.example"}}), Err("github.host")),
        (json!({"github": {"host": "a host"}}), Err("github.host")),
        (json!({"github": {"host": "https://git.example:99999"}}), Err("github.host")),
        (json!({"gitlab": {"token": "t", "host": "https://gitlab.example/g/s/r.git"}}), Err("gitlab.host")),
    ] {
        let user = UserId::new(Uuid::new_v4().to_string());
        let post = async |tokens: &Value| {
            let body = json!({"provider_tokens": tokens});
            api.call(&user, "POST", "/api/v1/settings", Some(&body)).await
        };
        assert_eq!(post(&first).await.0, 200);
        let (status, answer) = post(&change).await;
        let kept = store.get(&user).await.expect("the store").expect("settings").provider_tokens;
        let token = kept.0.first().and_then(|(_, token)| token.token.as_ref()).map(ExposeSecret::expose_secret);
        let (_, shown) = api.call(&user, "GET", "/api/v1/settings", None).await;
        match expected {
            Ok((expected, host)) => {
                assert_eq!((status, token), (200, expected), "{change}: {answer}");
                assert_eq!(shown["provider_tokens_set"]["github"], host, "{change}");
                assert_eq!(shown["provider_tokens_set"].get("gitlab"), None, "{change}");
            }
            Err(expected) => {
                assert_eq!((status, place(&answer)), (422, format!("provider_tokens.{expected}")), "{change}");
                assert!(!answer.to_string().contains(CANARY), "{answer}");
                assert_eq!((token, &shown["provider_tokens_set"]["github"]), (Some("ghp-0"), &json!("git.example")));
            }
        }
    }
    api.stop().await;
}

fn insecure() -> StartConfig {
    StartConfig { allow_insecure_git_access: true, ..quick() }
}

/// Pasted addresses are cloned; the record has the repository's name, the task the address as sent.
#[tokio::test]
async fn pasted_repository_addresses_are_cloned() {
    let git = GitServer::start().await;
    git.create_repository("o/r", &[("a.txt", "a", false)], &["dev"]).await;
    git.require("someone", "the-token");
    for (repository, branch) in [
        (format!("{}/o/r.git", git.url()), None),
        (format!(" {}/o/r/tree/dev ", git.url()), Some("dev")),
        (format!("http://me:canary-7731@{}/o/r", git.host()), None),
        (format!("git@{}:o/r.git", git.host().split(':').next().expect("a host")), None),
        ("o/r.git".to_owned(), None),
    ] {
        let harness = WorkerHarness::start(insecure()).await;
        let host = format!("{}/api/v3/", git.url());
        // A settings file may hold values that the API would normalise.
        let tokens = json!({"gitlab": {"token": null}, "github": {"token": "Bearer the-token\n", "host": host}});
        harness.set_settings(json!({"llm_model": "openai/x", "provider_tokens": tokens})).await;
        let mut body = json!({"selected_repository": repository});
        // `git@` has no port, but the host in the settings has one: both must mean the same server.
        if repository == "o/r.git" {
            body["git_provider"] = "github".into();
        }
        let task = harness.begin(&body).await;
        let done = harness.drive(task.id).await;
        assert_eq!(done.now.status, StartStatus::Ready, "{repository}: {:?}", done.now.detail);
        let id = done.now.app_conversation_id.expect("a conversation");
        let record = harness.conversations.get(&harness.user, id).await.expect("the store").expect("a record");
        let found = (record.selected_repository.as_deref(), record.selected_branch.as_deref());
        assert_eq!(found, (Some("o/r"), branch), "{repository}");
        assert_eq!(record.git_provider.map(ProviderType::as_str), Some("github"), "{repository}");
        let folder = format!("{}/r", harness.agent.working_dir());
        assert!(std::path::Path::new(&folder).join("a.txt").exists(), "{repository}");
        let config = std::fs::read_to_string(format!("{folder}/.git/config")).expect("a clone");
        assert!(config.contains(&format!("url = {}/o/r.git", git.url())), "{config}");
        let shown = serde_json::to_string(&harness.task(task.id).await.show_within(u64::MAX)).expect("JSON");
        assert!(!shown.contains(CANARY) && !config.contains(CANARY) && !config.contains("the-token"), "{repository}");
        harness.finish().await;
    }
}

#[tokio::test]
async fn repositories_that_cannot_be_cloned_are_refused_before_a_sandbox_is_created() {
    let harness = WorkerHarness::start(quick()).await;
    let tokens =
        json!({"github": {"token": "t", "host": "host of an earlier version"}, "azure_devops": {"token": "t"}});
    harness.set_settings(json!({"llm_model": "openai/x", "provider_tokens": tokens})).await;
    for body in [
        json!({"selected_repository": "norepo"}),
        json!({"selected_repository": "https://elsewhere.example/o/r"}),
        json!({"selected_repository": "o/r"}),
        json!({"selected_repository": "o/r", "git_provider": "github"}),
        json!({"selected_repository": "p/r", "git_provider": "azure_devops"}),
        json!({"selected_repository": "contoso/p/r", "selected_branch": "a..b"}),
    ] {
        let refused = harness.try_to_begin(&body).await;
        assert!(matches!(refused, Err(Error::Invalid(_))), "{body}: {refused:?}");
    }
    assert!(harness.sandboxes.made().is_empty());
    assert!(harness.receive().await.is_none(), "nothing is queued");
    harness.finish().await;
}

/// For any input, parsing does not panic, parsing the result gives the result again, and no credential is left.
#[test]
fn parsing_repository_names_is_idempotent() {
    let pieces = [
        "https://",
        "http://",
        "ssh://",
        "git@",
        "me:canary-7731@",
        "github.com",
        "gitlab.example:8443/gitlab",
        "dev.azure.com",
        "bb.example/context",
        "contoso",
        "[::1]",
        "/",
        "/",
        "/",
        ":",
        "?",
        "#",
        "@",
        "%2F",
        "%20",
        " ",
        "\n",
        "..",
        ".git",
        "o",
        "r",
        "ü",
        "tree",
        "blob",
        "-",
        "_git",
        "scm",
        "projects",
        "repos",
        "api",
        "v4",
        "?token=canary-7731",
        "#canary-7731=x",
        "?version=GBkey",
        "https:/",
        "https//",
        "http:",
        "me:8443/canary-7731@",
        "%40",
        "%3A",
        "dev.azure.com/contoso/p/_git/r",
        "explore",
        "~",
        "\u{200b}",
        "#dev",
    ];
    let texts =
        proptest::collection::vec(proptest::sample::select(pieces.to_vec()), 1..9).prop_map(|pieces| pieces.concat());
    let given = json!({"provider_tokens": providers()}).to_string();
    let tokens = Settings::from_json(&given).expect("settings").provider_tokens;
    let config = Config { cases: 20_000, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
        .run(&texts, |text| {
            let cleaned = without_credentials(&text);
            prop_assert_eq!(without_credentials(&cleaned), cleaned.clone());
            for provider in [None, Some(ProviderType::Gitlab), Some(ProviderType::AzureDevops)] {
                let _host = normal_host(provider.unwrap_or(ProviderType::Github), &text);
                let Ok(read) = Repository::read(&text, provider, &tokens) else { continue };
                prop_assert!(!read.name.contains("canary"), "{}", read.name);
                let again = Repository::read(&read.name, read.provider, &tokens);
                prop_assert_eq!(again.map(|again| again.name), Ok(read.name.clone()));
                let cleaned = Repository::read(&cleaned, provider, &tokens);
                prop_assert_eq!(cleaned.map(|cleaned| cleaned.name), Ok(read.name));
            }
            Ok(())
        })
        .expect("every text");
}
