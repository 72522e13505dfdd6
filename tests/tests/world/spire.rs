//! A SPIFFE Workload API that others have written: tonic and prost, over a Unix socket. Agent and collector are tried against it.

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::codegen::http;
use tonic::codegen::tokio_stream::Stream;
use tonic::server::{Grpc, ServerStreamingService};
use tonic::{Request, Response, Status};

#[derive(Clone, PartialEq, prost::Message)]
pub struct X509SvidRequest {}

#[derive(Clone, PartialEq, prost::Message)]
pub struct X509SvidResponse {
    #[prost(message, repeated, tag = "1")]
    pub svids: Vec<X509Svid>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub crl: Vec<Vec<u8>>,
    #[prost(map = "string, bytes", tag = "3")]
    pub federated_bundles: HashMap<String, Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct X509Svid {
    #[prost(string, tag = "1")]
    pub spiffe_id: String,
    #[prost(bytes = "vec", tag = "2")]
    pub x509_svid: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub x509_svid_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    pub bundle: Vec<u8>,
    #[prost(string, tag = "5")]
    pub hint: String,
}

/// What is answered.
pub type Answered = Result<X509SvidResponse, Status>;

/// What the server says: the newest of it to whoever asks, and each change to whoever listens.
#[derive(Clone)]
pub struct Spire(Arc<Mutex<Said>>);

/// The newest answer, who listens, and how often was asked.
type Said = (Answered, Vec<mpsc::Sender<Answered>>, usize);

pub struct Answers(mpsc::Receiver<Answered>);

impl Stream for Answers {
    type Item = Answered;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Answered>> {
        self.0.poll_recv(cx)
    }
}

impl ServerStreamingService<X509SvidRequest> for Spire {
    type Response = X509SvidResponse;
    type ResponseStream = Answers;
    type Future = std::future::Ready<Result<Response<Answers>, Status>>;

    fn call(&mut self, request: Request<X509SvidRequest>) -> Self::Future {
        let secured = request.metadata().get("workload.spiffe.io").is_some_and(|value| value == "true");
        let mut spire = self.0.lock().unwrap();
        spire.2 += 1;
        let answer = if secured { spire.0.clone() } else { Err(Status::invalid_argument("security header missing")) };
        std::future::ready(answer.map(|first| {
            let (tell, told) = mpsc::channel(16);
            tell.try_send(Ok(first)).unwrap();
            spire.1.push(tell);
            Response::new(Answers(told))
        }))
    }
}

impl Spire {
    pub fn new(answer: Answered) -> Spire {
        Spire(Arc::new(Mutex::new((answer, Vec::new(), 0))))
    }

    /// At a Unix socket, until it is aborted.
    pub fn serve(&self, path: &Path) -> JoinHandle<()> {
        let _ = std::fs::remove_file(path);
        let (listener, spire) = (UnixListener::bind(path).unwrap(), self.clone());
        tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let spire = spire.clone();
                let service = service_fn(move |request: http::Request<Incoming>| {
                    let spire = spire.clone();
                    async move {
                        assert_eq!(request.uri().path(), "/SpiffeWorkloadAPI/FetchX509SVID");
                        let mut grpc = Grpc::new(tonic_prost::ProstCodec::default());
                        Ok::<_, std::convert::Infallible>(grpc.server_streaming(spire, request).await)
                    }
                });
                let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                connections.spawn(async move { http.serve_connection(TokioIo::new(socket), service).await });
            }
        })
    }

    /// To whoever listens, and to whoever asks from now on.
    pub fn say(&self, answer: Answered) {
        let mut spire = self.0.lock().unwrap();
        spire.1.retain(|listener| listener.try_send(answer.clone()).is_ok());
        spire.0 = answer;
    }

    /// How often was asked.
    pub fn asked(&self) -> usize {
        self.0.lock().unwrap().2
    }
}
