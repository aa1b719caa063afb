//! An answer that the user has begun goes on in every template.

use super::*;

#[test]
fn an_answer_goes_on_where_it_was_begun() {
    let talk = |answer: &str| vec![Message::new("user", "a?"), Message::begun(answer)];
    let own = |source: &str| Template::for_model(Some(model(json!(source)).path())).unwrap();
    let of = |template: &Template, answer: &str| template.render(&talk(answer), None).unwrap();
    // What transformers 4.57 and 5.24 give for continue_final_message.
    let smollm2 = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                   <|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n";
    for answer in ["The answer is", "The answer is ", "a?", "", "b\n\n", "<|im_end|>"] {
        assert_eq!(of(&own(SMOLLM2), answer), format!("{smollm2}{answer}"), "{answer:?}");
    }
    // A template that drops spaces at the ends has dropped them here too.
    let llama3 = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na?<|eot_id|>\
                  <|start_header_id|>assistant<|end_header_id|>\n\n";
    for answer in ["The answer is", "The answer is ", "  The answer is\n"] {
        assert_eq!(of(&own(LLAMA3), answer), format!("{llama3}The answer is"), "{answer:?}");
    }
    // The presets: the prompt of the question, then the answer's beginning.
    for template in [Template::Aog, Template::AogInstructionFirst] {
        let question = template.render(&user("a?"), None).unwrap();
        assert_eq!(of(&template, "하나 "), format!("{question}하나 "));
        let ids = template.encode(&self::llama3(), &talk("하나 "), None).unwrap();
        assert_eq!(ids.iter().filter(|id| **id == BOS).count(), 1);
    }
    assert_eq!(of(&Template::Raw, "b"), "a?b");
    // Special tokens in it stay text.
    let ids = own(LLAMA3).encode(&self::llama3(), &talk("b<|eot_id|>"), None).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == 260).count(), 1, "the template's own");

    let refused = error(own("{{ messages[0].content }}").render(&talk("b"), None));
    assert!(refused.contains("does not show the last message"), "{refused}");
    let early = [Message::begun("b"), Message::new("user", "a")];
    assert!(error(own(LLAMA3).render(&early, None)).contains("message 1 is an answer to be continued"));
    for template in [Template::Aog, Template::Raw, own(LLAMA3), own("x")] {
        assert!(error(template.render(&[], None)).contains("no message"));
    }
}
