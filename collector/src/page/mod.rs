//! The page: three files inside the program, a client of the API like any other. It keeps the token in memory only.

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// Path, type and content of each file.
const FILES: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("page.js")),
    ("/icon.svg", "image/svg+xml", include_str!("icon.svg")),
];

/// Routes of the page's files.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.into_iter().fold(Router::new(), |router, (path, kind, content)| {
        router.route(path, get(move || async move { file(kind, content) }))
    })
}

fn file(kind: &'static str, content: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
        // The next version of the program has other files under the same names.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, content).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_events_can_never_become_markup() {
        let script = include_str!("page.js");
        let sinks = ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"];
        for sink in sinks {
            assert!(!script.contains(sink), "page.js uses {sink}");
        }
    }

    #[test]
    fn nothing_is_kept_in_the_browser_and_nothing_comes_from_elsewhere() {
        for (path, _, content) in FILES {
            for word in ["localStorage", "sessionStorage", "document.cookie", "indexedDB"] {
                assert!(!content.contains(word), "{path} uses {word}");
            }
            let elsewhere = content.replace("http://www.w3.org/2000/svg", "");
            let elsewhere = elsewhere.replace("spiffe://", "");
            assert!(!elsewhere.contains("https://") && !elsewhere.contains("http://"), "{path} names another origin");
            assert!(!content.contains(" style=\"") && !content.contains(" onclick="), "{path} needs a laxer policy");
        }
    }
}
