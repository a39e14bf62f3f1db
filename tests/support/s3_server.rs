//! A real S3 server over a folder: the crates `s3s` and `s3s-fs`.

use std::path::Path;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;

/// Starts a server over `root` on a free port and returns its address; it stops with the runtime.
/// Buckets are the folders of `root`.
pub async fn start(root: &Path, access_key_id: &str, secret_access_key: &str) -> String {
    let mut service = S3ServiceBuilder::new(FileSystem::new(root).expect("a folder to serve"));
    service.set_auth(SimpleAuth::from_single(access_key_id, secret_access_key));
    let service = service.build();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("a bound port"));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let service = service.clone();
            tokio::spawn(async move {
                let connections = Builder::new(TokioExecutor::new());
                // A client that goes away is no concern of the server's.
                let _ended = connections.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
    url
}
