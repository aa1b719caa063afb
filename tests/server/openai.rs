//! A client that others wrote and that reads every field strictly.

use super::{QUESTION, Site, answer};
use async_openai::{
    Client,
    config::OpenAIConfig,
    error::OpenAIError,
    types::{
        chat::{
            ChatCompletionRequestUserMessageArgs, ChatCompletionStreamOptions, CreateChatCompletionRequest,
            CreateChatCompletionRequestArgs, FinishReason, Role,
        },
        completions::CreateCompletionRequestArgs,
    },
};
use futures_util::StreamExt;

fn client(site: &Site) -> Client<OpenAIConfig> {
    let config = OpenAIConfig::new().with_api_base(format!("http://{}/v1", site.address)).with_api_key("any");
    Client::with_config(config)
}

fn request() -> CreateChatCompletionRequest {
    let message = ChatCompletionRequestUserMessageArgs::default().content(QUESTION).build().unwrap();
    let options = ChatCompletionStreamOptions { include_usage: Some(true), include_obfuscation: None };
    let mut request = CreateChatCompletionRequestArgs::default();
    request.model("demo").messages([message.into()]).temperature(0.0).stream_options(options).build().unwrap()
}

#[tokio::test]
async fn models() {
    let site = Site::new().await;
    let models = client(&site).models().list().await.unwrap();
    assert_eq!(models.data.iter().map(|m| m.id.as_str()).collect::<Vec<_>>(), ["demo", "other/name"]);
    assert_eq!(client(&site).models().retrieve("demo").await.unwrap().owned_by, "aoji");
}

#[tokio::test]
async fn chat() {
    let site = Site::new().await;
    let mut whole = request();
    whole.stream_options = None;
    let reply = client(&site).chat().create(whole).await.unwrap();
    let choice = &reply.choices[0];
    assert_eq!((choice.message.content.as_deref(), choice.message.role), (Some(answer().1.as_str()), Role::Assistant));
    assert_eq!(choice.finish_reason, Some(FinishReason::Stop));
    assert_eq!(reply.usage.unwrap().prompt_tokens as usize, answer().0.len());

    let mut stream = client(&site).chat().create_stream(request()).await.unwrap();
    let (mut text, mut usage) = (String::new(), None);
    while let Some(event) = stream.next().await {
        let event = event.unwrap();
        for choice in &event.choices {
            text.push_str(choice.delta.content.as_deref().unwrap_or_default());
        }
        usage = event.usage;
    }
    assert_eq!((text, usage.unwrap().prompt_tokens as usize), (answer().1, answer().0.len()));
}

#[tokio::test]
async fn completions() {
    let site = Site::new().await;
    let request =
        || CreateCompletionRequestArgs::default().model("demo").prompt("오늘").max_tokens(8u32).n(2).seed(1i64).clone();
    let reply = client(&site).completions().create(request().build().unwrap()).await.unwrap();
    assert_eq!(reply.choices.len(), 2);
    let mut stream = client(&site).completions().create_stream(request().stream(true).build().unwrap()).await.unwrap();
    let mut texts = [String::new(), String::new()];
    while let Some(event) = stream.next().await {
        for choice in event.unwrap().choices {
            texts[choice.index as usize].push_str(&choice.text);
        }
    }
    assert_eq!(texts, [reply.choices[0].text.clone(), reply.choices[1].text.clone()]);
}

#[tokio::test]
async fn logprobs() {
    let site = Site::new().await;
    let mut chat = request();
    (chat.stream_options, chat.logprobs, chat.top_logprobs) = (None, Some(true), Some(2));
    let reply = client(&site).chat().create(chat).await.unwrap();
    let tokens = reply.choices[0].logprobs.as_ref().unwrap().content.as_ref().unwrap();
    assert!(!tokens.is_empty() && tokens.iter().all(|t| t.top_logprobs.len() == 2 && t.logprob <= 0.0));
    let mut legacy = CreateCompletionRequestArgs::default();
    let legacy = legacy.model("demo").prompt("오늘").max_tokens(4u32).logprobs(1u8).echo(true).temperature(0.0);
    let reply = client(&site).completions().create(legacy.build().unwrap()).await.unwrap();
    let lists = reply.choices[0].logprobs.as_ref().unwrap();
    assert!(lists.tokens.len() == lists.token_logprobs.len() && lists.tokens.len() == lists.text_offset.len());
}

#[tokio::test]
async fn errors() {
    let site = Site::new().await;
    let mut wrong = request();
    wrong.model = "gpt-9".into();
    match client(&site).chat().create(wrong).await {
        Err(OpenAIError::ApiError(error)) => assert_eq!(error.api_error.code.as_deref(), Some("model_not_found")),
        other => panic!("{other:?}"),
    }
}
