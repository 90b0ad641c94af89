//! A URL → pairs of name and value, as `ado` makes them of `Keyword=value;…`.
//!
//! Knows how URLs are written and what is usually forgotten in them; not what the names mean. Invariant: no message quotes
//! a value.

use percent_encoding::percent_decode_str;

const ENCODED: &str = "it has reserved characters in the user name or password: write them as %40 (@), %2F (/), \
                       %3F (?), %23 (#), %25 (%)";

/// A URL's parts by the names of its dialect; `form` says what it should look like. A parser's messages may quote the
/// password, so ours say the rule only.
pub(super) fn pairs(text: &str, form: &'static str) -> Result<Vec<(String, String)>, &'static str> {
    let (_, behind_scheme) = text.split_once("://").ok_or(form)?;
    // The first of these ends the host. An @ behind it means that it stands in the password, and that what looks
    // like a path or a parameter is a part of it.
    if behind_scheme.find(['/', '?', '#']).is_some_and(|end| behind_scheme[end..].contains('@')) {
        return Err(ENCODED);
    }
    if text.contains(char::is_control) || text.contains('#') {
        return Err(ENCODED); // a parser drops these without a word
    }
    let url = url::Url::parse(text).map_err(|_| form)?;
    let decode = |text: &str| {
        let decoded = percent_decode_str(text).decode_utf8().map(String::from);
        decoded.map_err(|_| "it has percent-encoded bytes that are not UTF-8")
    };
    let mut pairs = vec![
        ("host".to_owned(), url.host_str().unwrap_or("").to_owned()),
        ("port".to_owned(), url.port().map_or_else(String::new, |port| port.to_string())),
        ("database".to_owned(), decode(url.path().trim_start_matches('/'))?),
        ("user".to_owned(), decode(url.username())?),
    ];
    let password = ("password".to_owned(), decode(url.password().unwrap_or(""))?);
    // Without an @, what looks like host:port may be user:password, and a parameter a part of that password: keywords
    // behind one are not shown.
    let authority = behind_scheme.split(['/', '?']).next().unwrap_or_default();
    let first = if authority.contains(':') && !authority.contains('@') { Some(&password) } else { None };
    pairs.extend(first.cloned());
    for parameter in url.query().unwrap_or("").split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        pairs.push((decode(name)?, decode(value)?));
    }
    pairs.push(password);
    Ok(pairs)
}
