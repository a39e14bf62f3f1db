//! TLS against a real server: what each `sslmode` accepts, and what it must refuse.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use brightrun_queue::private_server::{Options, PrivateServer};
use brightrun_queue::{Queue, QueueConfig};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// An authority of this test only.
fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap()
}

/// Writes a file as the server wants its key: owned by the server's user and readable to nobody else.
fn give(server: &PrivateServer, name: &str, contents: &str) -> PathBuf {
    let data = server.folder().join("data");
    let owner = std::fs::metadata(&data).unwrap();
    let path = data.join(name);
    std::fs::write(&path, contents).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
    path
}

/// Makes the server speak TLS with a certificate for `name`.
async fn serve_tls(server: &PrivateServer, issuer: &CertifiedIssuer<'static, KeyPair>, name: &str) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![name.to_owned()])
        .unwrap()
        .signed_by(&key, issuer)
        .unwrap();
    give(server, "server.crt", &certificate.pem());
    give(server, "server.key", &key.serialize_pem());
    let (client, connection) = tokio_postgres::connect(&server.url("postgres"), tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    client.batch_execute("alter system set ssl = on").await.unwrap();
    let before: chrono::DateTime<chrono::Utc> = client
        .query_one("select pg_conf_load_time()", &[])
        .await
        .unwrap()
        .get(0);
    client.query_one("select pg_reload_conf()", &[]).await.unwrap();
    // The reload is the postmaster's to do, after the call.
    let reloaded = "select pg_conf_load_time() > $1";
    while !client.query_one(reloaded, &[&before]).await.unwrap().get::<_, bool>(0) {
        tokio::task::yield_now().await;
    }
}

/// Whether the server says that the connection is encrypted, or why there is none.
async fn encrypted(url: &str, mode: &str, root: Option<&Path>) -> Result<bool, String> {
    let root = root
        .map(|root| format!("&sslrootcert={}", root.display()))
        .unwrap_or_default();
    let config = QueueConfig::new(&format!("{url}?sslmode={mode}{root}")).unwrap();
    let queue = Queue::connect(&config).await.map_err(|error| error.to_string())?;
    let client = queue.client().await.map_err(|error| error.to_string())?;
    let row = client
        .query_one("select ssl from pg_stat_ssl where pid = pg_backend_pid()", &[])
        .await
        .unwrap();
    Ok(row.get(0))
}

#[tokio::test]
async fn each_sslmode_accepts_and_refuses_what_it_says() {
    let server = PrivateServer::start(&Options {
        loopback: true,
        ..Options::default()
    })
    .unwrap();
    let url = server.loopback_url("postgres").unwrap();
    assert_eq!(
        encrypted(&url, "prefer", None).await,
        Ok(false),
        "the server has no TLS yet"
    );

    let (issuer, stranger) = (authority(), authority());
    let folder = tempfile::tempdir().unwrap();
    let (right, wrong) = (folder.path().join("right.pem"), folder.path().join("wrong.pem"));
    std::fs::write(&right, issuer.pem()).unwrap();
    std::fs::write(&wrong, stranger.pem()).unwrap();

    serve_tls(&server, &issuer, "database.example").await;
    assert_eq!(encrypted(&url, "disable", None).await, Ok(false));
    for (mode, root) in [
        ("prefer", None),
        ("require", None),
        ("require", Some(&right)),
        ("verify-ca", Some(&right)),
    ] {
        assert_eq!(
            encrypted(&url, mode, root.map(PathBuf::as_path)).await,
            Ok(true),
            "{mode}"
        );
    }
    for mode in ["require", "verify-ca", "verify-full"] {
        let refused = encrypted(&url, mode, Some(&wrong)).await.unwrap_err();
        assert!(refused.contains("certificate"), "{mode}: {refused}");
    }
    let refused = encrypted(&url, "verify-full", Some(&right)).await.unwrap_err();
    assert!(refused.contains("name"), "another machine's certificate: {refused}");

    serve_tls(&server, &issuer, "127.0.0.1").await;
    assert_eq!(encrypted(&url, "verify-full", Some(&right)).await, Ok(true));
    server.stop().unwrap();
}
